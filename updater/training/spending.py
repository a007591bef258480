"""What an update has spent so far, and the promise that it never spends more than its budget.

What comes next is bounded from above (:mod:`updater.budget.bound`), with what the passes after the last step will take
put aside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from updater.budget.bound import BudgetSpent, Costs, Size
from updater.budget.cost import Cost
from updater.step.learner import AnyLearner
from updater.training.checkpoint import Progress

TWICE = 1.5
"""What a pass of one process may take of what it takes in several, and the other way round: micro-batches run the model
forward once more, and a loss is computed in each process."""

ROUNDING = 1e-12
"""Share of a budget that sums in another order may differ by."""


class Spending:
    """GFLOPs of an update, of all its attempts.

    Args:
        budget: memory-adjusted GFLOPs.
        progress: where the update stands.
    """

    def __init__(self, budget: float, cost: Cost, progress: Progress, learner: AnyLearner) -> None:
        self._budget, self._cost, self._learner = budget / cost.memory_ratio * (1 - ROUNDING), cost, learner
        self._again = TWICE if learner.team.size > 1 else 1.0
        self._prepared: Callable[[], float] = learner.prepared_gflops
        self.steps = list(progress.gflops)
        """Of each step that was taken."""
        self.costs = Costs(progress.known or cost.known, progress.excess)
        """Of steps by their size."""

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
        if self._learner.answers_itself:  # the dearest says nothing about the others
            return self._within(left, most, 0.0)
        return self._within(left, most, self.costs.least(size))

    def stepped(self, size: Size, gflops: float) -> None:
        """A step was taken. Where its cost depends on what the model said, no other one is compared with it."""
        self.steps.append(gflops)
        self.costs.add(size, gflops, known=not self._learner.answers_itself)

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
        if self._learner.team.size > 1 or least > left:
            raise BudgetSpent(needed=self.spent() + most)
        return left

    def _closing(self, steps: int) -> list[int]:
        """Numbers of the steps whose batches are seen again after the last one."""
        return [number % steps for number in range(self._cost.closing)] if steps else []
