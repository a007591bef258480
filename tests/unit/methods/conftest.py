"""The base of these tests, which is never written to."""

from __future__ import annotations

import pytest

from serving.engines.clip_base import ClipBase
from tests.support.tiny import tiny_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))
