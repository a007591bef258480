from __future__ import annotations

from pathlib import Path

import pytest

from ops.testing.tiny import tiny_base
from serving.engines.clip_base import ClipBase


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    """One tiny random base for all tests here; nothing changes it."""
    return tiny_base(tmp_path_factory.mktemp("home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test puts an adapter."""
    return tmp_path / "adapter"
