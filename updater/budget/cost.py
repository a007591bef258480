"""Cost of an update, the steps that a budget pays for, and what has been spent. Memory-adjusted FLOPs (MAF) as in
FoMo-in-Flux, "A Practitioner's Guide to Continual Multimodal Pretraining": GFLOPs x (peak memory / peak memory of full
fine-tuning at the same batch). Both are measured in ``updater/training/measure.py``."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from core.errors import BudgetError
from updater.budget.bound import BudgetSpent, Costs, Size
from updater.data.mixture import BatchPlan
from updater.recipes import Part

TWICE = 1.5
"""Bound on the ratio between a pass in one process and the same pass in several, either way: micro-batches run the
forward pass once more, and each process computes the loss."""

ROUNDING = 1e-12
"""Relative error of a budget from sums in another order."""


class StepUnaffordable(BudgetError):
    """A budget does not pay for one step. ``needed``: a budget that would, in MAF-GFLOPs."""

    needed: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Measured cost of an update's first batch, saved with the update so that a resumed one plans the same steps."""

    step_gflops: float
    sample_gflops: float
    row_gflops: Mapping[Part, float]
    """GFLOPs computed once per example, by its pool: teachers' passes, and what no step changes."""
    texts_gflops: float
    """The same for texts that are in every batch."""
    peak_bytes: float
    full_bytes: float
    """Peak of full fine-tuning at the same batch."""
    row_bytes: float = 0.0
    closing: int = 0
    """Passes after the last step, in steps: gradients that regularizers measure."""
    known: Sequence[Any] = ()
    """Highest counted GFLOPs by size: see :meth:`updater.budget.bound.Costs.to_json`."""

    @property
    def memory_ratio(self) -> float:
        return self.peak_bytes / self.full_bytes

    def adjusted(self, gflops: float) -> float:
        return gflops * self.memory_ratio

    @property
    def maf_per_step(self) -> float:
        return self.step_gflops * self.memory_ratio

    def prepare_gflops(self, steps: int, plan: BatchPlan) -> float:
        return self.texts_gflops + sum(self.row_gflops[part] * plan.visited(part, steps) for part in plan.counts)

    def planned(self, steps: int, plan: BatchPlan) -> float:
        return self.prepare_gflops(steps, plan) * self.memory_ratio + (steps + self.closing) * self.maf_per_step

    def steps_within(self, gflops: float, most: int, plan: BatchPlan) -> int:
        """Largest number of steps, up to ``most``, that a budget pays for, including their rows. Raises
        StepUnaffordable if it does not pay for one."""
        if self.planned(1, plan) > gflops:
            raise self.unaffordable(gflops, plan)
        # Bisection works because the cost grows with each step.
        return bisect_right(range(1, most + 1), gflops, key=lambda steps: self.planned(steps, plan))

    def unaffordable(self, gflops: float, plan: BatchPlan, needed: float = 0.0) -> StepUnaffordable:
        needed = max(needed, self.planned(1, plan))
        prepare = self.prepare_gflops(1, plan) * self.memory_ratio
        closing = f", {self.closing} such passes at the end" if self.closing else ""
        error = StepUnaffordable(
            f"a budget of {gflops:,.0f} MAF-GFLOPs does not pay for one step with its own rows, which costs "
            f"{needed:,.1f} (to prepare the rows {prepare:,.1f}, a step {self.maf_per_step:,.1f}{closing}).",
            "Raise budget.gflops_per_update and gflops_per_day, or use a recipe with a smaller batch.",
        )
        error.needed = needed
        return error

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Spending:
    """GFLOPs of an update over all its attempts; guarantees that they never exceed its budget (memory-adjusted GFLOPs).

    Bounds the next pass from above (:mod:`updater.budget.bound`), with a reserve for the passes after the last step.
    ``steps``: GFLOPs of each step taken; ``costs``: of steps by their size; ``prepared``: of preparation so far, in all
    attempts. ``alone``: a single process computes, which can abort a pass; several stop before it. ``repeats``: steps
    of one size cost the same; otherwise the cost depends on the model's output.
    """

    def __init__(
        self, budget: float, cost: Cost, steps: Sequence[float], costs: Costs, prepared: Callable[[], float],
        alone: bool = True, repeats: bool = True,
    ) -> None:  # fmt: skip
        self._budget, self._cost = budget / cost.memory_ratio * (1 - ROUNDING), cost
        self._prepared, self._alone, self._repeats = prepared, alone, repeats
        self._again = 1.0 if alone else TWICE
        self.steps, self.costs = list(steps), costs

    def afford(self, most: float, least: float) -> float:
        """GFLOPs limit for preparing something that takes between ``least`` and ``most``. Raises BudgetSpent."""
        return self._within(self._left(self.steps), most, least)

    def afford_step(self, size: Size) -> float:
        """GFLOPs limit for a step of this size. Raises BudgetSpent."""
        number = len(self.steps)
        again = sum(batch == number for batch in self._closing(number + 1))
        left = self._left([*self.steps, 0.0]) / (1 + self._again * again)
        left = min(left, self._left(self.steps)) if number else left  # if it is aborted, the earlier steps are the last
        most = self.costs.most(size) * (1 if number else self._again)  # measured in one process
        # Where steps do not repeat, the most expensive one says nothing about the others.
        return self._within(left, most, self.costs.least(size) if self._repeats else 0.0)

    def stepped(self, size: Size, gflops: float) -> None:
        """Record a step. If its cost depended on the model's output, other steps are not compared with it."""
        self.steps.append(gflops)
        self.costs.add(size, gflops, known=self._repeats)

    def skipped(self) -> None:
        self.steps.append(0.0)

    def spent(self) -> float:
        return math.fsum([self._prepared(), *self.steps])

    def _left(self, steps: Sequence[float]) -> float:
        closing = math.fsum(steps[number] for number in self._closing(len(steps)))
        return self._budget - self.spent() - self._again * closing

    def _within(self, left: float, most: float, least: float) -> float:
        if most <= left:
            return math.inf
        if not self._alone or least > left:
            raise BudgetSpent(needed=self.spent() + most)
        return left

    def _closing(self, steps: int) -> list[int]:
        """Numbers of the steps whose batches are visited again after the last one."""
        return [number % steps for number in range(self._cost.closing)] if steps else []
