"""The bases that tests train: nothing is written to them."""

from __future__ import annotations

import pytest

from serving.engines.clip_base import ClipBase
from tests.support.tiny import tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    """A tiny CLIP."""
    return tiny_base(tmp_path_factory.mktemp("home"))
