"""A shared fixture for tests of the whole updater."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.settings import Settings
from tests.integration.updater.home import make_home
from tests.support.sealing import nothing_sealed as nothing_sealed
from tests.support.sealing import sealed as sealed


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A home with a tiny CLIP; files that need another base override it."""
    return make_home(tmp_path / "home")
