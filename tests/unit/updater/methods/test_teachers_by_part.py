"""The default recipes hold replayed rows to the adapter that the update begins with, and the reference to the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_adapter, tiny_base
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from tests.unit.updater.builders import answers, batch, learner_of, pools, question_pools, recipe
from updater.adapters import WeightDelta, read_delta
from updater.families.clip_learner import ClipLearner
from updater.methods import objectives
from updater.methods.batches import TeacherFeatures, summarise
from updater.methods.objectives import FeatureDistillation, TokenDistillation
from updater.recipes import Part
from updater.step.learner import Learner

NEW, REFERENCE, REPLAY = 0, [12, 13, 14, 15], [20, 21, 22, 23]
"""Rows of pools with 12 new, 8 reference and 8 replayed examples."""
PARTS: list[Part] = ["replay", "reference", "replay", "reference"]


def clip_learner(home: Path, start: bool) -> ClipLearner:
    base = tiny_base(home)
    delta: WeightDelta = {}
    if start:
        tiny_adapter(base, home / "adapter", seed=1)
        delta = read_delta(home / "adapter", base)
    pool = pools(new=12, reference=8, replay=8)
    learner = ClipLearner(base, recipe("default"), delta, seed=0)
    learner.prepare(pool.examples, pool.parts)
    return learner


def vlm_learner(home: Path, start: bool) -> Learner[Any]:
    base = tiny_vlm_base(home)
    delta: WeightDelta = {}
    if start:
        tiny_vlm_adapter(base, home / "adapter", seed=1)
        delta = read_delta(home / "adapter", base)
    return learner_of(base, question_pools(new=12, reference=8, replay=8), delta)


def distillation(learner: Learner[Any], rows: list[int]) -> float:
    """The distillation term over rows, unweighted."""
    values = objectives.values(learner.objectives, learner.batch(rows))
    (value,) = (float(value) for term, value in values if term.name.endswith("_distillation"))
    return value


@pytest.mark.parametrize("make", [clip_learner, vlm_learner])
def test_an_update_begins_where_replayed_rows_want_to_stay(make: Any, tmp_path: Path) -> None:
    learner = make(tmp_path, start=True)
    assert distillation(learner, REPLAY) == pytest.approx(0, abs=1e-6)
    assert distillation(learner, REFERENCE) > 1e-3
    both = distillation(learner, REFERENCE + REPLAY)
    assert both == pytest.approx(distillation(learner, REFERENCE) / 2, rel=1e-3)
    with torch.no_grad():
        for parameter in learner.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert distillation(learner, REPLAY) > 1e-4


@pytest.mark.parametrize("make", [clip_learner, vlm_learner])
def test_the_first_update_has_the_base_as_both_teachers(make: Any, tmp_path: Path) -> None:
    learner = make(tmp_path, start=False)
    assert distillation(learner, REPLAY) == pytest.approx(0, abs=1e-6)
    assert distillation(learner, REFERENCE) == pytest.approx(0, abs=1e-6)


def test_features_are_compared_with_those_of_each_rows_teacher() -> None:
    made, other = batch([0, 1, 2, 3], PARTS), batch([0, 1, 2, 3], seed=9)
    base, incumbent = made.teachers["base"], TeacherFeatures(other.image.detach(), other.text.detach())
    made = replace(made, teachers={"base": base, "incumbent": incumbent})
    by_row = [incumbent, base, incumbent, base]
    distance = [
        float((student[row] - taught[row]).square().sum())
        for row, sides in enumerate(by_row)
        for student, taught in ((made.image, sides.image), (made.text, sides.text))
    ]
    assert float(FeatureDistillation(replay="incumbent")(made)) == pytest.approx(sum(distance) / 8, rel=1e-5)
    for rows, teacher in (([0, 2], "incumbent"), ([1, 3], "base")):
        alone = made.select(rows)
        plain = FeatureDistillation(teacher=teacher)(alone)
        assert torch.equal(FeatureDistillation(replay="incumbent")(alone), plain)


def test_tokens_are_compared_with_those_of_each_rows_teacher() -> None:
    made, _ = answers([2, 1, 3, 2], parts=PARTS)
    other = summarise(torch.randn(8, 7, generator=torch.Generator().manual_seed(4)), 7)
    made = replace(made, teachers={**made.teachers, "incumbent": other})
    value = TokenDistillation(replay="incumbent")(made)
    halves = [
        TokenDistillation(teacher=name)(made.select(rows)) for rows, name in (([0, 2], "incumbent"), ([1, 3], "base"))
    ]
    torch.testing.assert_close(value, torch.stack(halves).mean())
    assert not torch.allclose(value, TokenDistillation()(made))


def test_a_row_that_is_compared_with_no_teacher_cannot_be_taken_for_one_that_is(tmp_path: Path) -> None:
    learner = clip_learner(tmp_path, start=True)
    teachers = learner.batch([NEW, *REFERENCE, *REPLAY]).teachers
    for name, rows in (("base", range(1, 5)), ("incumbent", range(5, 9))):
        known = [place for place in range(9) if not teachers[name].image[place].isnan().any()]
        assert known == list(rows)


@pytest.mark.parametrize("make", [clip_learner, vlm_learner])
def test_a_teacher_is_asked_about_the_pools_that_are_compared_with_it_and_no_other(make: Any, tmp_path: Path) -> None:
    learner = make(tmp_path, start=True)
    learner.ready([NEW, *REFERENCE, *REPLAY])
    teachers = {part: _teachers(learner, row) for part, row in zip(PARTS[:2], (REPLAY[0], REFERENCE[0]), strict=True)}
    assert teachers == {"replay": {"incumbent"}, "reference": {"base"}}
    assert _teachers(learner, NEW) == set()
    costs = learner.row_gflops([NEW, *REFERENCE, *REPLAY])
    assert costs["new"] < min(costs["reference"], costs["replay"])


def _teachers(learner: Learner[Any], row: int) -> set[str]:
    """Those of which something is kept for a row."""
    names = {word for name in learner.shards.names(row) for word in name.split(".")}
    return names & {"base", "incumbent"}
