"""The most that a pass costs, by its size and by what others cost: an update stops before what it cannot pay for.

The FLOPs of a pass are a polynomial of its sizes whose coefficients are not negative: of second degree in lengths
(attention), and of second degree in counts (a loss that compares every row with every other). So where no count is
more than c times, and no length more than l times that of a pass that took f, it takes at most f c^2 l^2. On a straight
way from one size to another that is larger in everything, such a polynomial is convex: it is below the line between.

Where even that is above what is left, and what smaller passes took is not, a process by itself tries, and breaks the
pass off before the operation that would exceed the budget. Several processes would wait for each other: they stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MARGIN = 1.01
"""A pass may take so much above its bound: terms of a loss that see more rows than before, a queue that fills. They
are a small part of any step, and they grow slowly: what the steps before took above theirs is allowed for, too."""

KEPT = 32
"""Sizes whose costs are remembered, the last ones: each pair of them is looked at before each step."""


class BudgetSpent(Exception):
    """The next pass may cost more than is left.

    ``broken_off``: GFLOPs of what was begun of it. ``needed``: what it may cost with all that was spent before.
    """

    def __init__(self, broken_off: float = 0.0, needed: float = 0.0) -> None:
        super().__init__("the budget is spent")
        self.broken_off, self.needed = broken_off, needed


@dataclass(frozen=True)
class Size:
    """The size of a pass, which its cost grows with."""

    counts: tuple[float, ...] = ()
    """Numbers of things that run side by side: rows, texts."""
    lengths: tuple[float, ...] = ()
    """Tokens of the longest text, and of the longest of another kind, values of all pictures. 0 where there is none,
    which then took no more than one as long as the first."""
    gflops: float = 0.0
    """The part that is known to grow with something else alone, at most: a head that is asked about some tokens."""

    def to_json(self) -> list[Any]:
        """Plain values."""
        return [list(self.counts), list(self.lengths), self.gflops]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Size:
        """Read what :meth:`to_json` gave."""
        counts, lengths, gflops = values
        return cls(tuple(counts), tuple(lengths), float(gflops))

    def growth(self, other: Size) -> float:
        """The factor on the cost of another size at which this size costs no more."""
        counts = max(map(_ratio, self.counts, other.counts), default=1.0)
        lengths = max(map(_ratio, self.lengths, (each or other.lengths[0] for each in other.lengths)), default=1.0)
        return max(1.0, counts) ** 2 * max(1.0, lengths) ** 2

    def between(self, small: Size, large: Size) -> float:
        """The place of this size between a small and a large one, 0 to 1; infinite where it is not between them."""
        far = 0.0
        for own, one, other in zip(*(s.counts + s.lengths for s in (self, small, large)), strict=True):
            if own > other or one > other:
                return math.inf
            if own > one:
                far = max(far, (own - one) / (other - one))
        return far


class Costs:
    """GFLOPs of passes of one kind, by their sizes.

    >>> costs = Costs()
    >>> costs.add(Size((8,), (20,)), 2.0)
    >>> costs.most(Size((8,), (40,)))
    8.08
    """

    def __init__(self, known: Sequence[Sequence[Any]] = (), excess: float = 1.0) -> None:
        """``known``: of :meth:`to_json`."""
        self._known = {Size.from_json(size): float(gflops) for size, gflops in known}
        self.excess = excess
        """The largest ratio of a pass's cost to its bound without the margin, at least 1."""

    def most(self, size: Size) -> float:
        """The most that a pass of this size takes; 0 where nothing is known, so that a first one is measured."""
        return MARGIN * self.excess * self._bound(size)

    def least(self, size: Size) -> float:
        """The least that it takes: as much as any that was smaller in everything."""
        return max((gflops for known, gflops in self._known.items() if size.between(known, size) <= 1), default=0.0)

    def add(self, size: Size, gflops: float, known: bool = True) -> None:
        """A pass of this size took so much. Without ``known``, another one of it may take more."""
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
        """Each size, and what a pass of it took."""
        return [[size.to_json(), taken] for size, taken in self._known.items()]


def _above(one: float, other: float) -> float:
    return max(0.0, one - other)


def _ratio(one: float, other: float) -> float:
    return one / other if other else (1.0 if not one else math.inf)
