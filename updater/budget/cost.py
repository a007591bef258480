"""The cost of an update, the steps that a budget pays for, and what has been spent of it so far.

Memory-adjusted FLOPs (MAF) as in FoMo-in-Flux, "A Practitioner's Guide to Continual Multimodal Pretraining":
GFLOPs x (peak memory / peak memory of full fine-tuning at the same batch). How both are measured is in
``updater/training/measure.py``.
"""

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
"""A pass of one process may take so much of what it takes in several, and the other way round: micro-batches run the
model forward once more, and a loss is computed in each process."""

ROUNDING = 1e-12
"""Share of a budget that sums in another order may differ by."""


class StepUnaffordable(BudgetError):
    """A budget does not pay for one step. ``needed``: what would, in MAF-GFLOPs."""

    needed: float = 0.0


@dataclass(frozen=True)
class Cost:
    """Measured once per update, on its first batch, and kept with it: a resumed update plans the same steps."""

    step_gflops: float
    """Forward and backward of one batch, on average."""
    sample_gflops: float
    """Forward pass of one sample through the whole model."""
    row_gflops: Mapping[Part, float]
    """GFLOPs that are computed once of an example, by its pool: teachers' passes, and what no step changes."""
    texts_gflops: float
    """The same of texts that are in every batch."""
    peak_bytes: float
    full_bytes: float
    """Peak of full fine-tuning at the same batch."""
    row_bytes: float = 0.0
    """Disk that is taken for an example, at most."""
    closing: int = 0
    """Steps' worth of passes after the last step: gradients that regularizers measure."""
    known: Sequence[Any] = ()
    """The counted GFLOPs, by size, each at its dearest: see :meth:`updater.budget.bound.Costs.to_json`."""

    @property
    def memory_ratio(self) -> float:
        """Peak memory over that of full fine-tuning."""
        return self.peak_bytes / self.full_bytes

    def adjusted(self, gflops: float) -> float:
        """GFLOPs, memory-adjusted."""
        return gflops * self.memory_ratio

    @property
    def maf_per_step(self) -> float:
        """Memory-adjusted GFLOPs of a step."""
        return self.step_gflops * self.memory_ratio

    def prepare_gflops(self, steps: int, plan: BatchPlan) -> float:
        """GFLOPs of preparing so many steps: the rows that they visit, and no others."""
        return self.texts_gflops + sum(self.row_gflops[part] * plan.visited(part, steps) for part in plan.counts)

    def planned(self, steps: int, plan: BatchPlan) -> float:
        """Memory-adjusted GFLOPs of so many steps and of preparing the rows that they visit."""
        return self.prepare_gflops(steps, plan) * self.memory_ratio + (steps + self.closing) * self.maf_per_step

    def steps_within(self, gflops: float, most: int, plan: BatchPlan) -> int:
        """Steps that a budget pays for with their own rows, at most ``most``.

        Raises StepUnaffordable when it does not pay for one.
        """
        if self.planned(1, plan) > gflops:
            raise self.unaffordable(gflops, plan)
        # The last number of steps that is within: the cost grows with each.
        return bisect_right(range(1, most + 1), gflops, key=lambda steps: self.planned(steps, plan))

    def unaffordable(self, gflops: float, plan: BatchPlan, needed: float = 0.0) -> StepUnaffordable:
        """``needed``: memory-adjusted GFLOPs of the first step, where they are above what an average one takes."""
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
        """Plain values."""
        return asdict(self)


class Spending:
    """GFLOPs of an update, of all its attempts, and the promise that they never exceed its budget.

    What comes next is bounded from above (:mod:`updater.budget.bound`), with what the passes after the last step will
    take put aside.

    Args:
        budget: memory-adjusted GFLOPs.
        steps: what each step took that was taken.
        costs: of steps by their size.
        prepared: what was prepared so far, in all attempts.
        alone: one process computes, which can break a pass off; several stop before it.
        repeats: steps of one size take the same; without it, what a step takes depends on what the model says.
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
        """GFLOPs under which something may be prepared that takes so much. Raises BudgetSpent."""
        return self._within(self._left(self.steps), most, least)

    def afford_step(self, size: Size) -> float:
        """GFLOPs under which a step of this size may be taken. Raises BudgetSpent."""
        number = len(self.steps)
        again = sum(batch == number for batch in self._closing(number + 1))
        left = self._left([*self.steps, 0.0]) / (1 + self._again * again)
        left = min(left, self._left(self.steps)) if number else left  # if it is broken off, the others are the last
        most = self.costs.most(size) * (1 if number else self._again)  # what was measured is the step of one process
        # Where steps do not repeat, the dearest says nothing about the others.
        return self._within(left, most, self.costs.least(size) if self._repeats else 0.0)

    def stepped(self, size: Size, gflops: float) -> None:
        """A step was taken. Where its cost depends on what the model said, no other one is compared with it."""
        self.steps.append(gflops)
        self.costs.add(size, gflops, known=self._repeats)

    def skipped(self) -> None:
        """A step of which no row could be used."""
        self.steps.append(0.0)

    def spent(self) -> float:
        """GFLOPs so far, without the passes after the last step."""
        return math.fsum([self._prepared(), *self.steps])

    def _left(self, steps: Sequence[float]) -> float:
        """GFLOPs, if the update ends with these steps."""
        closing = math.fsum(steps[number] for number in self._closing(len(steps)))
        return self._budget - self.spent() - self._again * closing

    def _within(self, left: float, most: float, least: float) -> float:
        if most <= left:
            return math.inf
        if not self._alone or least > left:
            raise BudgetSpent(needed=self.spent() + most)
        return left

    def _closing(self, steps: int) -> list[int]:
        """Numbers of the steps whose batches are seen again after the last one."""
        return [number % steps for number in range(self._cost.closing)] if steps else []
