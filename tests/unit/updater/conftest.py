"""The bases of these tests, which are never written to."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from tests.support.sealing import nothing_sealed as nothing_sealed
from tests.support.sealing import sealed as sealed
from tests.support.tiny import tiny_base
from tests.support.tiny_vlm import tiny_vlm_base
from updater.budget.cost import Cost
from updater.step.learner import AnyLearner
from updater.training.measure import measure


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    return tiny_vlm_base(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session", autouse=True)
def _vlms_are_copied() -> Iterator[None]:
    """Copy the model of a VLM base: transformers takes five times as long to build a tiny one."""
    build, built = VlmBase.build_model, dict[Path, nn.Module]()

    def copied(base: VlmBase) -> nn.Module:
        if base.model not in built:
            built[base.model] = build(base)
        return deepcopy(built[base.model])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(VlmBase, "build_model", copied)
        yield


@pytest.fixture(scope="module")
def _costs() -> dict[Any, Cost]:
    return {}


@pytest.fixture
def measured_once(_costs: dict[Any, Cost], monkeypatch: pytest.MonkeyPatch) -> None:
    """Count a step's cost once for each base, recipe and mixture: that is half of the time of a short update. For tests
    that say nothing about costs."""

    def measured(learner: AnyLearner, *arguments: Any) -> Cost:
        key = learner.base.directory, learner.recipe.digest, frozenset(learner.parts)
        return _costs.get(key) or _costs.setdefault(key, measure(learner, *arguments))

    monkeypatch.setattr("updater.training.plan.measure", measured)
