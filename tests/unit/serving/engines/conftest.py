from __future__ import annotations

from pathlib import Path

import pytest

from serving.engines.clip_base import ClipBase
from tests.support.tiny import tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for an adapter."""
    return tmp_path / "adapter"
