from __future__ import annotations

import stat
from pathlib import Path

import pytest

from core.files import replace_file, replacing


def test_a_file_is_replaced_as_a_whole_or_stays_as_it_was_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "scores.npz"
    replace_file(path, b"old")
    replace_file(path, b"new", mode=0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ZeroDivisionError), replacing(path) as staging:
        staging.write_bytes(b"half")
        assert (staging.parent, staging.suffix, path.read_bytes()) == (path.parent, ".npz", b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]
