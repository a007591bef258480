"""Every shipped CLIP recipe: trained twice in a row on a tiny base, and served as trained; some stopped and resumed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.engines.clip_base import ClipBase
from serving.engines.lora import effective_weights
from tests.unit.updater.builders import assert_served_as_trained, pools, recipe, resumed, run
from updater.budget.cost import Cost
from updater.recipes import load_recipe, recipe_names
from updater.step.learner import AnyLearner
from updater.training.measure import measure

RESUMED = frozenset({"codyra", "default", "ewc", "finetuned-merge", "galore", "si"})
"""Stopped and resumed, too: one for each kind of state that a checkpoint holds."""
OFTEN = RESUMED | {"ema-merge", "locked-image", "naive", "replay", "wise-ft", "zscl"}
"""What users are led to; the other recipes take as long again, and are left to `make long`."""
CLIP = [
    pytest.param(name, marks=() if name in OFTEN else pytest.mark.long)
    for name in recipe_names()
    if load_recipe(name).family == "clip"
]


@pytest.mark.parametrize("name", CLIP)
def test_two_updates_in_a_row_change_what_may_change_and_are_served_as_trained(
    base: ClipBase, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("updater.training.plan.measure", _measured_once())
    plan = recipe(name, max_steps=3)
    first = run(base, tmp_path / "first", recipe=plan)
    changed = effective_weights(first.directory, base.build_model())
    assert any(name.startswith("visual.") for name in changed) != plan.image.locked
    assert any(not name.startswith("visual.") for name in changed) != plan.text.locked
    again = {
        "recipe": plan,
        "pools": pools(replay=12),
        "incumbent": first.directory,
        "carry_over": first.carry_over,
        "seed": 5,
    }
    second = run(base, tmp_path / "second", **again)
    assert first.adapter != second.adapter
    if name in RESUMED:
        assert resumed(partial(run, base, tmp_path / "stopped", **again), 4).adapter == second.adapter
    assert all(np.isfinite(values).all() for values in second.losses.values())
    assert_served_as_trained(base, second)


def _measured_once() -> Callable[..., Cost]:
    """Measures updates of the same parts once; counting is more than half of the time of each."""
    found: dict[frozenset[str], Cost] = {}

    def measured(learner: AnyLearner, *arguments: Any) -> Cost:
        parts = frozenset(learner.parts)
        if parts not in found:
            found[parts] = measure(learner, *arguments)
        return found[parts]

    return measured
