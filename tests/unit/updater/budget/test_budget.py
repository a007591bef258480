"""Memory-adjusted FLOPs against counts by hand, and the spending of updates against their plans."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from tests.unit.updater.builders import LIMITS, pairs, picture, pools, recipe, run
from updater.budget.bound import MARGIN, BudgetSpent, Costs, Size
from updater.budget.cost import Cost, Spending, StepUnaffordable
from updater.budget.flops import counted
from updater.data.mixture import BatchPlan
from updater.data.pools import Pools, Question
from updater.families.clip_learner import ClipLearner
from updater.recipes import Part, Recipe
from updater.step.learner import AnyLearner, Learner
from updater.training import plan as planning
from updater.training.measure import measure, peak_saved_bytes
from updater.training.result import TrainResult


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
    assert [cost.steps_within(budget, 100, plan) for budget in (14, 28.9, 29, 1e9)] == [1, 2, 3, 100]
    assert replace(cost, closing=2).planned(3, plan) == cost.planned(3, plan) + 2 * 5, "passes after the last step"
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


def test_a_pass_of_a_known_size_takes_what_it_took_and_of_an_unknown_kind_nothing_is_known() -> None:
    costs = Costs()
    assert costs.most(Size((8,), (20,))) == 0
    costs.add(Size((8,), (20,)), 2.0)
    assert costs.most(Size((8,), (20,))) == costs.most(Size((4,), (3,))) == MARGIN * 2
    assert costs.most(Size((16,), (40,))) == MARGIN * 2 * 4 * 4
    costs.add(Size((8,), (30,)), 3.0)
    assert costs.most(Size((8,), (25,))) == pytest.approx(MARGIN * 2.5)


class Counted:
    """GFLOPs of every step, of preparation, and of passes after the last step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps: list[float] = []
        self.waiting: list[float] = []
        self.patch = patch
        backward, update = Learner.forward_backward, Learner.optimizer_step

        def counting(learner: AnyLearner, rows: list[int], regularized: bool = True) -> tuple[float, dict[str, float]]:
            learner.ready(rows)
            with counted() as flops:
                made = backward(learner, rows, regularized)
            self.waiting.append(flops.gflops)
            return made

        def updating(learner: AnyLearner, *given: object) -> None:
            self.steps.append(self.waiting[-1])
            self.waiting.clear()
            update(learner, *given)  # type: ignore[arg-type]

        patch.setattr(Learner, "forward_backward", counting)
        patch.setattr(Learner, "optimizer_step", updating)

    def spent(self, result: TrainResult) -> float:
        closing = self.waiting[: int(result.cost["closing"])]
        other = result.cost["prepare_gflops"] + result.cost["broken_off_gflops"]
        return float(sum(self.steps) + sum(closing) + other) * float(result.cost["memory_ratio"])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    yield Counted(monkeypatch)


LAST = {"image": {"blocks": 1}, "text": {"blocks": 1}}


@pytest.mark.parametrize(
    ("name", "changes", "incumbent"),
    [
        ("default", {}, False),
        ("default", LAST, True),
        ("locked-text", {}, True),
        ("vr-lwf", {}, True),  # texts of its own in every batch
        *((name, LAST, False) for name in ("codyra", "ln-fit", "galore")),
        # Each as one of the above but for a part.
        pytest.param("default", {"views": {"count": 3}}, False, marks=pytest.mark.long),
        *(pytest.param(name, {}, False, marks=pytest.mark.long) for name in ("locked-image", "naive")),
        *(
            pytest.param(name, LAST, False, marks=pytest.mark.long)
            for name in ("dora", "nusa-cl", "full", "vera", "bit-fit")
        ),
    ],
)
def test_an_update_spends_what_it_planned_within_two_percent(
    base: ClipBase, tmp_path: Path, taken: Counted, name: str, changes: dict[str, Any], incumbent: bool
) -> None:
    """Also with masks, pruned ranks, projections and views, and in preparation, where a locked tower that an incumbent
    has changed is run twice.
    """
    start, plan, prepare = None, recipe(name, **changes), ClipLearner.ready
    if incumbent:
        start = run(base, tmp_path / "before").directory
        taken.steps.clear()
    prepared: list[float] = []

    def ready(learner: ClipLearner, rows: Sequence[int]) -> None:
        with counted() as flops:
            prepare(learner, rows)
        prepared.append(flops.gflops)

    taken.patch.setattr(ClipLearner, "ready", ready)
    others = 14 * (plan.mixture.reference > 0), 10 * (plan.mixture.replay > 0)
    result = run(base, tmp_path, recipe=plan, pools=pools(14, *others), incumbent=start)
    assert result.cost["step_gflops"] == pytest.approx(sum(taken.steps) / result.steps, rel=0.02)
    spent, ratio = sum(prepared) + sum(taken.steps), result.cost["memory_ratio"]
    assert [result.maf_planned / ratio, result.maf / ratio] == pytest.approx([spent, spent], rel=0.02)


def asked(count: int, length: Callable[[int], float]) -> tuple[Question, ...]:
    return tuple(
        Question(f"{i}", "which colour?" + " look again!" * int(length(i)), "red", partial(picture, i % 20))
        for i in range(count)
    )


def asked_by(chance: random.Random) -> tuple[Question, ...]:
    return asked(20, lambda _: min(30, chance.lognormvariate(1, 0.9)))


def test_long_questions_after_a_hundred_short_batches_stop_the_update_within_its_budget(
    vlm: VlmBase, tmp_path: Path, taken: Counted
) -> None:
    """The plan looks at the first batches alone: 4.6 times the budget was spent."""
    taken.patch.setattr(planning, "MEASURED", 10)
    questions = Pools(asked(200, lambda number: 12 * (number >= 22)))
    plan = recipe("vlm-naive", max_steps=120, batch_size=2)
    free = run(vlm, tmp_path / "free", recipe=recipe("vlm-naive", max_steps=1, batch_size=2), pools=questions)
    budget = 100 * free.cost["maf_per_step"]
    taken.steps.clear()
    result = run(vlm, tmp_path, recipe=plan, pools=questions, limits=replace(LIMITS, gflops=budget))
    assert 10 < result.steps < result.planned_steps
    assert result.budget_spent and not result.truncated
    assert 0.8 * budget < result.maf <= budget
    assert result.maf == pytest.approx(taken.spent(result), rel=1e-9)
    assert result.directory.is_dir()


class Pretended:
    """A learner whose batches have random sizes, with costs from a random polynomial."""

    def __init__(self, chance: random.Random) -> None:
        self.chance, self.prepared, self.closing = chance, 0.0, chance.choice([0, 0, 3, 8])
        self.coefficients = [chance.random() ** 3 for _ in range(6)]
        self.longest = chance.randint(2, 500)
        self.grows = chance.choice([0.0, 1e-4])
        """Growth of a term of the loss with each step, as with a queue."""

    def prepared_gflops(self) -> float:
        return self.prepared

    def batch(self, step: int) -> tuple[Size, float]:
        rows = 8 - (self.chance.random() < 0.1)  # one of them cannot be prepared
        tokens, seen = self.chance.randint(1, self.longest), self.chance.choice([16.0, 64.0, 4096.0])
        head = self.chance.randint(8, 40)
        return self.sized(rows, tokens, seen, head, step)

    def sized(self, rows: int, tokens: int, seen: float, head: int, step: int) -> tuple[Size, float]:
        fixed, each, linear, square, pictures, answers = self.coefficients
        taken = fixed + rows * (each + linear * tokens + square * tokens**2 / 100) + pictures * seen / 100
        taken += answers * head
        return Size((rows,), (tokens, seen), answers * head * 1.5), taken * (1 + self.grows * step)

    def cost(self) -> Cost:
        """As measured: the first batch at three lengths."""
        tokens = self.chance.randint(1, self.longest)
        probes = [self.sized(8, length, 64.0, 20, 0) for length in (tokens, tokens + 8, tokens + 16)]
        known = [[size.to_json(), flops] for size, flops in probes]
        return Cost(1, 1, {}, 0, peak_bytes=self.chance.random(), full_bytes=1, closing=self.closing, known=known)


def pretend(number: int) -> tuple[float, float, str]:
    """Budget, spending, and how it ended. An interrupted pass costs its maximum."""
    chance = random.Random(number)
    learner = Pretended(chance)
    cost, most = learner.cost(), chance.randint(1, 60)
    budget = cost.adjusted(cost.known[0][1] * 10 ** chance.uniform(0, 3.5))
    spending = Spending(budget, cost, (), Costs(cost.known), learner.prepared_gflops)
    outcome, broken_off = "whole", 0.0
    for step in range(most):
        size, taken = learner.batch(step)
        outcome = "stopped" if step else "none"
        try:
            if (limit := spending.afford(0.1 * taken, 0.0)) < 0.1 * taken:
                broken_off = limit
                break
            learner.prepared += 0.1 * taken
            if (limit := spending.afford_step(size)) < taken:
                broken_off = limit
                break
        except BudgetSpent:
            break
        outcome = "whole"
        spending.stepped(size, taken)
        if chance.random() < 0.2:  # killed, and resumed from the checkpoint
            costs = Costs(spending.costs.to_json(), spending.costs.excess)
            spending = Spending(budget, cost, spending.steps, costs, learner.prepared_gflops)
    steps = spending.steps
    closing = [steps[each % len(steps)] for each in range(learner.closing)] if steps else []
    return budget, cost.adjusted(learner.prepared + sum(steps) + sum(closing) + broken_off), outcome


@pytest.mark.long
def test_over_hundreds_of_random_draws_no_update_spends_more_than_its_budget() -> None:
    """Budgets, lengths, pictures, numbers of steps, passes after the last one, kills."""
    outcomes: Counter[str] = Counter()
    for number in range(200):
        budget, spent, outcome = pretend(number)
        assert spent <= budget, (number, spent / budget)
        outcomes[outcome] += 1
    assert min(outcomes[each] for each in ("none", "stopped", "whole")) > 10, outcomes


Drawn = tuple[Recipe, Pools, float]
"""A recipe, data and a budget by chance."""


def draw(base: VlmBase | ClipBase, folder: Path, taken: Counted, drawn: Drawn, seed: int) -> str:
    plan, pool, gflops = drawn
    taken.steps.clear()
    taken.waiting.clear()
    try:
        result = run(base, folder, recipe=plan, pools=pool, limits=replace(LIMITS, gflops=gflops), seed=seed)
    except StepUnaffordable:
        return "none"
    assert result.maf == pytest.approx(taken.spent(result), rel=1e-9)
    assert result.maf <= gflops, result.maf / gflops
    shutil.rmtree(folder)
    return "stopped" if result.budget_spent else "whole"


def with_passes_after_the_last_step(chance: random.Random) -> Drawn:
    ewc = [{"name": "ewc", "options": {"batches": chance.randint(1, 8)}}]
    plan = recipe("full", max_steps=6, batch_size=6, regularizers=ewc, text={"locked": True})
    return plan, pools(), 10 ** chance.uniform(-0.5, 0.5)


def with_lengths_batches_and_teachers(chance: random.Random) -> Drawn:
    size, name = chance.randint(2, 4), chance.choice(["vlm-naive", "vlm-default"])
    pool = Pools(asked_by(chance), asked_by(chance) if name == "vlm-default" else ())
    return recipe(name, max_steps=6, batch_size=size), pool, 10 ** chance.uniform(-2, 0)


def with_answers_of_its_own(chance: random.Random) -> Drawn:
    """They may end early in the first step, and late in another."""
    return recipe("vlm-sdft", max_steps=3, batch_size=2), Pools(asked_by(chance), asked_by(chance)), 0.9


@pytest.mark.parametrize(
    ("made", "measured", "draws", "ends"),
    [
        (with_passes_after_the_last_step, 1, 5, {"whole"}),
        pytest.param(with_lengths_batches_and_teachers, 2, 16, {"none", "stopped", "whole"}, marks=pytest.mark.long),
        pytest.param(with_answers_of_its_own, planning.MEASURED, 2, {"stopped"}, marks=pytest.mark.long),
    ],
)
def test_over_random_draws_no_real_update_spends_more_than_its_budget(
    base: ClipBase, vlm: VlmBase, tmp_path: Path, taken: Counted, made: Any, measured: int, draws: int, ends: set[str]
) -> None:
    taken.patch.setattr(planning, "MEASURED", measured)
    taken.patch.setattr("updater.training.measure._full", lambda *_: (1e7, 1e-3))  # the same base each time
    outcomes = set()
    for number in range(draws):
        drawn = made(random.Random(number))
        outcomes.add(draw(vlm if drawn[0].family == "vlm" else base, tmp_path / "work", taken, drawn, number))
    assert outcomes == ends
