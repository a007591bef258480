"""The upper bound of a pass, from the cost of earlier ones: never below the real cost, and no update exceeds its
budget.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from serving.engines.clip_base import ClipBase
from serving.engines.vlm.vlm_base import VlmBase
from tests.unit.updater.builders import LIMITS, picture, pools, recipe, run
from updater.budget.bound import MARGIN, BudgetSpent, Costs, Size
from updater.budget.cost import Cost, Spending, StepUnaffordable
from updater.budget.flops import counted
from updater.data.pools import Pools, Question
from updater.recipes import Recipe
from updater.step.learner import AnyLearner, Learner
from updater.training import measure
from updater.training import plan as planning
from updater.training.result import TrainResult


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


def asked(count: int, length: Callable[[int], float]) -> tuple[Question, ...]:
    return tuple(
        Question(f"{i}", "which colour?" + " look again!" * int(length(i)), "red", partial(picture, i % 20))
        for i in range(count)
    )


def asked_by(chance: random.Random) -> tuple[Question, ...]:
    return asked(20, lambda _: min(30, chance.lognormvariate(1, 0.9)))


def test_long_questions_after_a_hundred_short_batches_stop_the_update_within_its_budget(
    vlm: VlmBase, tmp_path: Path, taken: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan looks at the first batches alone: 4.6 times the budget was spent."""
    monkeypatch.setattr(planning, "MEASURED", 10)
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


def test_over_hundreds_of_random_draws_no_update_spends_more_than_its_budget() -> None:
    """Budgets, lengths, pictures, numbers of steps, passes after the last one, kills."""
    outcomes: Counter[str] = Counter()
    for number in range(200):
        budget, spent, outcome = pretend(number)
        assert spent <= budget, (number, spent / budget)
        outcomes[outcome] += 1
    assert min(outcomes[each] for each in ("none", "stopped", "whole")) > 10, outcomes


def draw(base: VlmBase | ClipBase, folder: Path, taken: Counted, plan: Recipe, pool: Pools, gflops: float) -> str:
    taken.steps.clear()
    taken.waiting.clear()
    try:
        result = run(base, folder, recipe=plan, pools=pool, limits=replace(LIMITS, gflops=gflops))
    except StepUnaffordable:
        return "none"
    assert result.maf == pytest.approx(taken.spent(result), rel=1e-9)
    assert result.maf <= gflops, result.maf / gflops
    shutil.rmtree(folder)
    return "stopped" if result.budget_spent else "whole"


def with_passes_after_the_last_step(chance: random.Random) -> tuple[Recipe, Pools, float]:
    ewc = [{"name": "ewc", "options": {"batches": chance.randint(1, 8)}}]
    plan = recipe("full", max_steps=6, batch_size=6, regularizers=ewc, text={"locked": True})
    return plan, pools(), 10 ** chance.uniform(-0.5, 0.5)


def with_lengths_batches_and_teachers(chance: random.Random) -> tuple[Recipe, Pools, float]:
    size, name = chance.randint(2, 4), chance.choice(["vlm-naive", "vlm-default"])
    pool = Pools(asked_by(chance), asked_by(chance) if name == "vlm-default" else ())
    return recipe(name, max_steps=6, batch_size=size), pool, 10 ** chance.uniform(-2, 0)


def with_answers_of_its_own(chance: random.Random) -> tuple[Recipe, Pools, float]:
    """They may end early in the first step, and late in another."""
    return recipe("vlm-sdft", max_steps=3, batch_size=2), Pools(asked_by(chance), asked_by(chance)), 0.9


@pytest.mark.parametrize(
    ("made", "draws", "ends"),
    [
        (with_passes_after_the_last_step, 5, {"whole"}),
        pytest.param(with_lengths_batches_and_teachers, 16, {"none", "stopped", "whole"}, marks=pytest.mark.long),
        pytest.param(with_answers_of_its_own, 2, {"stopped"}, marks=pytest.mark.long),
    ],
)
def test_over_random_draws_no_real_update_spends_more_than_its_budget(
    base: ClipBase, vlm: VlmBase, tmp_path: Path, taken: Counted, monkeypatch: pytest.MonkeyPatch,
    made: Callable[[random.Random], tuple[Recipe, Pools, float]], draws: int, ends: set[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(planning, "MEASURED", 2)
    monkeypatch.setattr(measure, "_full", lambda *_: (1e7, 1e-3))  # the same base each time
    outcomes = set()
    for number in range(draws):
        plan, pool, gflops = made(random.Random(number))
        outcomes.add(draw(vlm if plan.family == "vlm" else base, tmp_path / "work", taken, plan, pool, gflops))
    assert outcomes == ends
