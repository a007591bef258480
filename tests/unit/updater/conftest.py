"""The bases of these tests, which are never written to."""

from __future__ import annotations

import pytest

from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.sealing import nothing_sealed as nothing_sealed
from tests.support.sealing import sealed as sealed
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    return tiny_vlm_base(tmp_path_factory.mktemp("home"))
