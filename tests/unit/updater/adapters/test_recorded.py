from __future__ import annotations

from pathlib import Path

import pytest

from core.artifacts import Artifacts, directory_digest
from core.errors import AdapterError
from core.ledger import Ledger
from updater.adapters.recorded import fetch_recorded


def test_an_adapter_with_other_files_than_those_that_were_recorded_is_refused(tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    artifacts = Artifacts(str(tmp_path / "artifacts"))
    work = tmp_path / "work"
    work.mkdir()
    (work / "weights").write_bytes(b"1")
    for name, digest in (("clip-a", directory_digest(work)), ("clip-old", None)):
        artifacts.put_directory(work, f"adapters/{name}")
        ledger.register_adapter(name, "clip", "base", "i", "t", {}, digest=digest)
    assert (fetch_recorded(artifacts, ledger, "clip-a") / "weights").read_bytes() == b"1"
    for name in ("clip-a", "clip-old"):
        (artifacts.fetch(f"adapters/{name}") / "weights").write_bytes(b"2")
    with pytest.raises(AdapterError, match="is not the one in the ledger"):
        fetch_recorded(artifacts, ledger, "clip-a")
    assert fetch_recorded(artifacts, ledger, "clip-old")  # recorded before digests were
    ledger.close()
