"""Fixtures of the tests of streams."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams.store.sample_store import SampleStore


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return SampleStore(str(tmp_path / "lake"))
