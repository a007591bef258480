"""Upper bounds on the cost of a pass, so that an update stops before it exceeds its budget.

The FLOPs of a pass are a polynomial of its sizes with non-negative coefficients, of second degree in lengths
(attention) and in counts (a loss that compares every row with every other). So a pass whose counts are at most c times,
and lengths at most l times, those of a pass that took f, takes at most f c^2 l^2. Along a straight line from one size
to a larger one in every dimension, such a polynomial is convex: it is below the chord. If that bound exceeds what is
left, but smaller passes took less, a single process tries and aborts the pass before the operation that would exceed
the budget. Several processes would wait for each other: they stop instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MARGIN = 1.01
"""Tolerance above the bound, for terms of a loss that see more rows than before or a queue that fills. They are a small
part of a step and grow slowly; the largest excess so far is also allowed for (:attr:`Costs.excess`)."""

KEPT = 32
"""Number of sizes whose costs are remembered, the newest: each pair of them is compared before each step."""


class BudgetSpent(Exception):
    """The next pass may cost more than is left. ``broken_off``: GFLOPs of the aborted part. ``needed``: its bound plus
    everything spent before."""

    def __init__(self, broken_off: float = 0.0, needed: float = 0.0) -> None:
        super().__init__("the budget is spent")
        self.broken_off, self.needed = broken_off, needed


@dataclass(frozen=True)
class Size:
    counts: tuple[float, ...] = ()
    lengths: tuple[float, ...] = ()
    """Tokens of the longest text, and of the longest of another kind; values of all pictures. 0 if absent: it then cost
    at most as much as one of the first length."""
    gflops: float = 0.0
    """Upper bound of a part that grows only with something else: an output head applied to some tokens."""

    def to_json(self) -> list[Any]:
        return [list(self.counts), list(self.lengths), self.gflops]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Size:
        counts, lengths, gflops = values
        return cls(tuple(counts), tuple(lengths), float(gflops))

    def growth(self, other: Size) -> float:
        """Factor on the cost of ``other`` that bounds the cost of this size."""
        counts = max(map(_ratio, self.counts, other.counts), default=1.0)
        lengths = max(map(_ratio, self.lengths, (each or other.lengths[0] for each in other.lengths)), default=1.0)
        return max(1.0, counts) ** 2 * max(1.0, lengths) ** 2

    def between(self, small: Size, large: Size) -> float:
        """Position of this size between a small and a large one, 0 to 1; infinite if it is not between them."""
        far = 0.0
        for own, one, other in zip(*(s.counts + s.lengths for s in (self, small, large)), strict=True):
            if own > other or one > other:
                return math.inf
            if own > one:
                far = max(far, (own - one) / (other - one))
        return far


class Costs:
    """GFLOPs of passes of one kind, by their sizes."""

    def __init__(self, known: Sequence[Sequence[Any]] = (), excess: float = 1.0) -> None:
        self._known = {Size.from_json(size): float(gflops) for size, gflops in known}
        self.excess = excess
        """Largest ratio of a pass's cost to its bound without the margin, at least 1."""

    def most(self, size: Size) -> float:
        """Upper bound for a pass of this size; 0 if nothing is known, so that a first one is measured."""
        return MARGIN * self.excess * self._bound(size)

    def least(self, size: Size) -> float:
        """Lower bound: the highest cost of a pass that was smaller in every dimension."""
        return max((gflops for known, gflops in self._known.items() if size.between(known, size) <= 1), default=0.0)

    def add(self, size: Size, gflops: float, known: bool = True) -> None:
        """Record the cost of a pass. With ``known=False`` another pass of this size may cost more."""
        if (bound := self._bound(size)) > 0:
            self.excess = max(self.excess, gflops / bound)
        if known:
            self._known[size] = max(gflops, self._known.pop(size, 0.0))
            if len(self._known) > KEPT:
                del self._known[next(iter(self._known))]

    def _bound(self, size: Size) -> float:
        known = list(self._known.items())
        bounds = [taken * size.growth(other) + _above(size.gflops, other.gflops) for other, taken in known]
        for small, least in known:
            for large, most in known:
                if small is not large and (far := size.between(small, large)) <= 1:
                    alone = small.gflops + far * (large.gflops - small.gflops)
                    bounds.append(least + far * (most - least) + _above(size.gflops, alone))
        return min(bounds, default=0.0)

    def __bool__(self) -> bool:
        return bool(self._known)

    def to_json(self) -> list[list[Any]]:
        return [[size.to_json(), taken] for size, taken in self._known.items()]


def _above(one: float, other: float) -> float:
    return max(0.0, one - other)


def _ratio(one: float, other: float) -> float:
    return one / other if other else (1.0 if not one else math.inf)
