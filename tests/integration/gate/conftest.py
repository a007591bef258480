"""One home for the gate runs of all engines: training its base and its adapters takes longer than a run."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def taught_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that keeps the models that each test file trains."""
    return tmp_path_factory.mktemp("taught")
