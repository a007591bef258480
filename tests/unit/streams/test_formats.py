"""A store that an earlier version of Ratchet has written is opened, migrated and continued: see ``tests/data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streams.store import SampleStore
from tests.support.written_state import DATA, contents, unpack


@pytest.fixture(params=["0_1"])
def written(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[SampleStore, dict[str, Any]]:
    """The store, and what was in it when it was written."""
    folder = DATA / f"written_by_{request.param}"
    unpack(folder / "lake.tar.xz", tmp_path)
    return SampleStore(str(tmp_path / "lake")), json.loads((folder / "lake.json").read_text())


def test_what_was_stored_is_the_same(written: tuple[SampleStore, dict[str, Any]]) -> None:
    store, described = written
    assert contents(store) == described
