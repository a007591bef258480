"""Memory-adjusted FLOPs against counts by hand, and the spending of updates against their plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serving.engines.clip_base import ClipBase
from tests.unit.updater.builders import pairs, pools, recipe, run
from updater.budget.cost import Cost, StepUnaffordable
from updater.budget.flops import counted
from updater.data.mixture import BatchPlan
from updater.families.clip_learner import ClipLearner
from updater.recipes import Part
from updater.training.measure import measure, peak_saved_bytes


def _learner(base: ClipBase, name: str = "naive", new: int = 12, device: str = "cpu", **changes: Any) -> ClipLearner:
    learner = ClipLearner(base, recipe(name, **changes), {}, seed=0, device=device)
    learner.prepare(pairs("car", new), ["new"] * new)
    return learner


def _measured(learner: ClipLearner, rows: int = 12) -> Cost:
    return measure(learner, learner.examples, [list(range(rows))])


def _cost(base: ClipBase, name: str = "naive", **changes: Any) -> Cost:
    return _measured(_learner(base, name, **changes))


def test_the_forward_pass_of_one_sample_is_counted_by_hand(base: ClipBase) -> None:
    """Two towers of 2 blocks x 64: 17 image and 16 text tokens; 12 width² multiply-adds a token, plus attention."""
    cost = _cost(base, image={}, text={})
    tokens = {"image": 17, "text": 16}
    layers = sum(2 * 2 * 12 * 64 * 64 * n for n in tokens.values())
    attention = sum(2 * 2 * 2 * n * n * 64 for n in tokens.values())
    patches = 2 * 16 * 3 * 8 * 8 * 64
    heads = 2 * 2 * 64 * 32
    assert cost.sample_gflops * 1e9 == pytest.approx(layers + attention + patches + heads, rel=0.01)
    assert 2 < cost.step_gflops / (12 * cost.sample_gflops) < 4, "forward and backward"


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_convolution_costs_backward_twice_what_it_costs_forward(groups: int) -> None:
    layer = nn.Conv2d(8, 16, 3, padding=1, groups=groups, bias=False)
    image = torch.rand(2, 8, 5, 5, requires_grad=True)
    forward = 2 * 2 * 5 * 5 * 16 * (8 // groups) * 3 * 3
    with counted() as first:
        made = layer(image).sum()
    with counted() as second:
        made.backward()
    assert (first.gflops * 1e9, second.gflops * 1e9) == (forward, 2 * forward)


def test_saved_tensors_are_counted_once_until_they_are_freed_and_parameters_not_at_all() -> None:
    layer, inputs = nn.Linear(100, 50), [torch.randn(10, 100) for _ in range(3)]
    x = torch.randn(10, 100, requires_grad=True) * 1  # its gradient needs the weights
    with peak_saved_bytes(layer) as peak:
        kept = layer(x).relu()
        (layer(x) * kept).sum()
    # x once (used twice), relu's output once, the second product's other side once; the weights never.
    assert peak() == 4 * (10 * 100 + 10 * 50 + 10 * 50)
    with peak_saved_bytes(layer) as one_by_one:
        for x in inputs:
            layer(x).square().sum().backward()
    with peak_saved_bytes(layer) as together:
        sum(layer(x).square().sum() for x in inputs).backward()  # type: ignore[union-attr]
    assert together() == 3 * one_by_one() == 3 * 4 * (10 * 100 + 10 * 50)
    q, k, v = (torch.randn(2, 4, 9, 16, requires_grad=True) * 1 for _ in range(3))
    with peak_saved_bytes(nn.Identity()) as peak:
        nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    assert peak() == 4 * 4 * (2 * 4 * 9 * 16), "attention keeps its inputs and output, whatever the kernel adds"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("blocks", [{}, {"blocks": 1}])
def test_a_gpu_and_a_cpu_count_the_same(base: ClipBase, blocks: dict[str, int]) -> None:
    """Except for the mask of the text tower, which a GPU's attention keeps padded."""
    cpu, gpu = (_measured(_learner(base, device=each, image=blocks, text=blocks)) for each in ("cpu", "cuda"))
    assert gpu.full_bytes == cpu.full_bytes
    assert gpu.peak_bytes == pytest.approx(cpu.peak_bytes, rel=0.01)
    assert gpu.step_gflops == pytest.approx(cpu.step_gflops, rel=1e-9)


def _plan(**sizes: int) -> BatchPlan:
    return BatchPlan({"new": 10, "reference": 10}, {"replay": 0, **sizes}, seed=0)


def test_steps_follow_from_the_budget_with_the_rows_that_they_visit() -> None:
    rows: dict[Part, float] = {"new": 0.2, "reference": 0.6}
    cost = Cost(step_gflops=10, sample_gflops=0.1, row_gflops=rows, texts_gflops=10, peak_bytes=1, full_bytes=2)
    assert cost.maf_per_step == 5
    # A step has 10 new rows (1 MAF-GFLOP of preparation) and 10 reference rows (3), of which there are 20 in all.
    plan = _plan(new=1_000_000, reference=20)
    assert [cost.planned(steps, plan) for steps in (1, 2, 3)] == [5 + 9, 5 + 18, 5 + 24]
    assert [cost.steps_within(budget, 100, plan) for budget in (28.9, 29, 1e9)] == [2, 3, 100]
    with pytest.raises(StepUnaffordable, match="Raise budget") as error:
        cost.steps_within(13.9, 100, plan)
    assert error.value.needed == 14
    pending = [_plan(new=new, reference=20) for new in (1000, 10**9)]
    assert len({cost.steps_within(300, 100, plan) for plan in pending}) == 1, "beyond the visited rows nothing costs"


def test_full_fine_tuning_is_the_measure_of_memory_and_all_else_is_below(base: ClipBase) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "full": {}, "galore": {}, "ln-fit": {}, "bit-fit": {}, "dora": {"image": {}, "text": {}},
    }  # fmt: skip
    ratio = {name: _cost(base, name, **changes).memory_ratio for name, changes in kinds.items()}
    assert ratio["full"] == pytest.approx(1, abs=0.03)
    locked = [_cost(base, "full", **{tower: {"locked": True}}) for tower in ("image", "text")]
    assert max(cost.memory_ratio for cost in locked) < ratio["full"] - 0.02
    assert max(cost.step_gflops for cost in locked) < _cost(base, "full").step_gflops
    assert max(ratio["ln-fit"], ratio["bit-fit"], ratio["dora"]) < 0.5
    # Its moments are those of a subspace: what it saves of two whole moments.
    assert ratio["galore"] < ratio["full"] - 0.25


def test_measuring_leaves_no_hook_and_no_gradient(base: ClipBase) -> None:
    learner = _learner(base, "full", new=6, text={"locked": True})
    first = _measured(learner, 6)
    assert not any(module._forward_hooks for module in learner.model.model.modules())
    assert all(parameter.grad is None for parameter in learner.parameters.values())
    assert _measured(learner, 6) == first


def recorded(monkeypatch: pytest.MonkeyPatch, name: str) -> list[float]:
    real: Callable[..., Any] = getattr(ClipLearner, name)
    calls: list[float] = []

    def counting(self: ClipLearner, rows: list[int], *given: Any) -> Any:
        if name != "ready":
            self.ready(rows)  # counts for itself
        with counted() as flops:
            made = real(self, rows, *given)
        calls.append(flops.gflops)
        return made

    monkeypatch.setattr(ClipLearner, name, counting)
    return calls


LAST = {"image": {"blocks": 1}, "text": {"blocks": 1}}


@pytest.mark.parametrize(
    ("name", "changes", "incumbent"),
    [
        ("default", {}, False),
        ("default", LAST, True),
        ("locked-image", {}, False),
        ("locked-text", {}, True),
        ("naive", {}, False),
        ("vr-lwf", {}, True),  # texts of its own in every batch
        *((name, LAST, False) for name in ("dora", "vera", "codyra", "nusa-cl", "full", "ln-fit", "bit-fit", "galore")),
    ],
)
def test_an_update_spends_what_it_planned_within_two_percent(
    base: ClipBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, Any], incumbent: bool
) -> None:
    """Also with masks, pruned ranks and projections, and in preparation, where a locked tower that an incumbent has
    changed is run twice.
    """
    start = run(base, tmp_path / "before").directory if incumbent else None
    prepared, steps = (recorded(monkeypatch, each) for each in ("ready", "forward_backward"))
    plan = recipe(name, **changes)
    others = 14 * (plan.mixture.reference > 0), 10 * (plan.mixture.replay > 0)
    result = run(base, tmp_path, recipe=plan, pools=pools(14, *others), incumbent=start)
    probe, taken = steps[0], steps[-result.steps :]
    assert probe == pytest.approx(sum(taken) / len(taken), rel=0.02)
    spent, ratio = sum(prepared) + sum(taken), result.cost["memory_ratio"]
    assert [result.maf_planned / ratio, result.maf / ratio] == pytest.approx([spent, spent], rel=0.02)
