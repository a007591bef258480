"""What an update really spent, operation by operation, against what it planned and what the ledger is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from serving.engines.clip_base import ClipBase
from tests.support.tiny_vlm import tiny_vlm_base
from tests.unit.updater.builders import picture, pools, recipe, run
from updater.budget.flops import counted
from updater.data.pools import Pools, Question
from updater.families.clip_learner import ClipLearner
from updater.families.vlm_learner import VlmLearner
from updater.recipes import Recipe
from updater.step.learner import AnyLearner


def recorded(monkeypatch: pytest.MonkeyPatch, kind: type[AnyLearner], name: str) -> list[float]:
    """GFLOPs of every call of a method of a learner, from now on."""
    real: Callable[..., Any] = getattr(kind, name)
    calls: list[float] = []

    def counting(self: AnyLearner, rows: list[int], *given: Any) -> Any:
        if name != "ready":
            self.ready(rows)  # counts for itself
        with counted() as flops:
            made = real(self, rows, *given)
        calls.append(flops.gflops)
        return made

    monkeypatch.setattr(kind, name, counting)
    return calls


LAST = {"image": {"blocks": 1}, "text": {"blocks": 1}}


@pytest.mark.parametrize(
    ("plan", "incumbent"),
    [
        pytest.param(recipe("default"), False, id="default"),
        pytest.param(recipe("default", **LAST), True, id="last blocks over an incumbent"),
        pytest.param(recipe("locked-image"), False, id="locked image tower"),
        pytest.param(recipe("locked-text"), True, id="locked text tower over an incumbent"),
        pytest.param(recipe("naive"), False, id="naive"),
        pytest.param(recipe("vr-lwf"), True, id="texts of its own in every batch"),
    ],
)
def test_an_update_spends_what_it_planned_within_two_percent(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: Recipe, incumbent: bool
) -> None:
    """Also in preparation, where a locked tower that an incumbent has changed is run twice."""
    start = run(base, tmp_path / "before").directory if incumbent else None
    prepared = recorded(monkeypatch, ClipLearner, "ready")
    steps = recorded(monkeypatch, ClipLearner, "forward_backward")
    pool = pools(new=14, reference=0 if plan.name == "naive" else 14, replay=0 if plan.name == "naive" else 10)
    result = run(base, tmp_path, recipe=plan, pools=pool, incumbent=start)
    probe, taken = steps[0], steps[-result.steps :]
    assert probe == pytest.approx(sum(taken) / len(taken), rel=0.02)
    spent = sum(prepared) + sum(taken)
    ratio = result.cost["memory_ratio"]
    assert result.maf_planned / ratio == pytest.approx(spent, rel=0.02)
    assert result.maf / ratio == pytest.approx(spent, rel=0.02)


def test_batches_that_are_as_long_as_their_longest_question_cost_what_they_cost_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One question in twelve is four times as long: about half of the batches have none of those."""
    steps = recorded(monkeypatch, VlmLearner, "forward_backward")
    questions = tuple(
        Question(f"{i}", "which colour is it?" + " look again!" * (i % 12 == 0) * 8, "red", partial(picture, i))
        for i in range(48)
    )
    plan = recipe("vlm-naive", max_steps=16, batch_size=6)
    result = run(tiny_vlm_base(tmp_path), tmp_path, recipe=plan, pools=Pools(questions))
    short, *_, long = sorted(steps)
    assert long > 1.5 * short
    taken = steps[-result.steps :]
    assert result.cost["step_gflops"] == pytest.approx(sum(taken) / len(taken), rel=0.02)
