"""Micro-batches give the gradient of the whole batch, with less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from serving.engines.clip_base import ClipBase
from tests.support.tiny_vlm import tiny_vlm_base
from tests.unit.updater.builders import learner_of, pools, question_pools, recipe, run
from updater.families.clip_learner import ClipLearner
from updater.step.learner import Learner
from updater.step.passes import CachedPasses
from updater.training.measure import measure

ROWS = [0, 13, 2, 25, 14, 5, 27, 16, 8, 21, 1]
"""Of pools with 12 new, 8 reference and 8 replayed examples; 11 rows do not divide into micro-batches of 4."""


def learner(base: ClipBase, name: str, **changes: Any) -> ClipLearner:
    pool = pools(new=12, reference=8, replay=8)
    made = ClipLearner(base, recipe(name, **changes), {}, seed=0)
    made.prepare(pool.examples, pool.parts)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # away from the start, where LoRA's A has no gradient
        for parameter in made.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return made


def gradients(made: Learner[Any], rows: list[int]) -> dict[str, Tensor]:
    made.forward_backward(rows)
    return {name: p.grad.clone() for name, p in made.parameters.items() if p.grad is not None}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys() and any(bool(value.any()) for value in first.values())
    largest = max(float(value.abs().max()) for value in first.values())
    return all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-4 * largest) for name in first)


@pytest.mark.parametrize("name", ["default", "locked-image", "ctp", "dreamlip", "vr-lwf", "dora", "full"])
def test_the_gradient_is_that_of_the_whole_batch(base: ClipBase, name: str) -> None:
    whole, cached = learner(base, name), learner(base, name, micro_batch=4)
    losses = whole.forward_backward(ROWS), cached.forward_backward(ROWS)
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert losses[0][1] == pytest.approx(losses[1][1], rel=1e-3, abs=1e-5)
    assert same(gradients(whole, ROWS), gradients(cached, ROWS))


def test_rows_that_conflict_are_left_out_of_it_too(base: ClipBase) -> None:
    changes = {"gradients": {"drop": 0.5}}
    whole, cached = learner(base, "default", **changes), learner(base, "default", micro_batch=4, **changes)
    assert same(gradients(whole, ROWS), gradients(cached, ROWS))
    assert whole.left_out and whole.left_out == cached.left_out


def test_passes_without_a_backward_pass_are_forgotten(base: ClipBase) -> None:
    made = learner(base, "default", micro_batch=4)
    expected = gradients(made, ROWS)
    made.batch(ROWS)
    assert same(expected, gradients(made, ROWS))


@pytest.mark.parametrize("changes", [{}, {"image": {"locked": False}}])
def test_a_vlm_too(tmp_path: Path, changes: dict[str, Any]) -> None:
    pool = question_pools(new=12, reference=8, replay=8)
    base = tiny_vlm_base(tmp_path)
    whole, cached = (learner_of(base, pool, micro_batch=size, **changes) for size in (0, 4))
    assert same(gradients(whole, ROWS), gradients(cached, ROWS))


def test_it_takes_less_memory_and_one_forward_pass_more(base: ClipBase) -> None:
    pool = pools(new=12, reference=8, replay=8)
    costs = [
        measure(learner(base, "default", micro_batch=size), list(pool.new), [list(range(24))]) for size in (0, 12, 4)
    ]
    whole, half, sixth = (cost.peak_bytes for cost in costs)
    # Of the whole batch both towers are kept, of a micro-batch one at a time: at least 1/2 against 1/2 - 1/6 is saved.
    assert whole - half > 1.4 * (half - sixth) > 0
    assert half - sixth > 0.1 * (whole - sixth)
    assert 1.2 < costs[1].step_gflops / costs[0].step_gflops < 1.6
    # Beside its rows each pass runs one picture through the stem.
    assert costs[1].step_gflops < costs[2].step_gflops < 1.05 * costs[1].step_gflops


def test_an_update_ends_where_one_with_the_whole_batch_does(base: ClipBase, tmp_path: Path) -> None:
    whole, cached = (run(base, tmp_path / str(size), recipe=recipe(micro_batch=size, max_steps=3)) for size in (0, 4))
    for name, values in whole.losses.items():
        assert cached.losses[name] == pytest.approx(values, rel=1e-3, abs=1e-6)
    assert cached.steps == whole.steps == 3


def test_without_gradients_nothing_is_kept_for_a_backward_pass() -> None:
    passes = CachedPasses(2)
    weight = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        assert passes(lambda rows: weight * torch.tensor(rows), [1, 2, 3]).tolist() == [1, 2, 3]
    passes.backward()
    assert weight.grad is None
