"""Updates that move ranks as real ones did, by a given amount.

A real update moves the ranks of many items up and of nearly as many down. Each simulated item takes the move of a real
one whose ranks were about the same (its *donor*), of one donor forwards or of another one backwards. A learned domain
has more items of the first kind. Otherwise an item takes the better or the worse of both moves, in the proportion that
yields the wanted change. The number of moving items is as in the real update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.gate.stock import Ranks
from benchmarks.lifetime.outcomes import Source
from updater.gate.statistics import reciprocal_log_rank

EDGES = (1, 3, 5, 10, 30, 100)
"""Ranks between two edges are about the same; 5 is where recall@5 ends."""
LEARNING_ROUNDS = 4
"""A large gain is several real updates' worth; the rest then goes the shorter way."""
MOST_ROUNDS = 12
"""Attempts after which a change is given up as impossible."""
Generator = np.random.Generator
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Kernel:
    """Donors by their ranks before the move."""

    first: Ranks
    second: Ranks
    order: NDArray[np.int_]
    """Donors sorted by cell."""
    starts: NDArray[np.int_]
    """[cells + 1]: where each cell begins in ``order``."""

    @classmethod
    def of(cls, first: Ranks, second: Ranks) -> Kernel:
        """From ``first`` to ``second``, both [donors, views]."""
        cells = _cells(first)
        count = (len(EDGES) + 1) ** first.shape[1]
        starts = np.searchsorted(np.sort(cells), np.arange(count + 1))
        return cls(first, second, np.argsort(cells, kind="stable"), starts)

    def step(self, ranks: Ranks, rng: Generator) -> Ranks:
        """Each item's ranks after its donor's move; those without a donor stay. Shape [n, views]."""
        cells = _cells(ranks)
        low, high = self.starts[cells], self.starts[cells + 1]
        known = high > low
        place = low + (rng.random(len(ranks)) * (high - low)).astype(np.int_)
        donors = self.order[np.minimum(place, len(self.order) - 1)]
        moved = known[:, None] & (self.first[donors] != self.second[donors])
        return np.where(moved, self.second[donors], ranks).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Moves:
    """Moves of the items of one suite."""

    k: int
    """Ranks below it are hits."""
    forward: Kernel
    backward: Kernel

    @classmethod
    def of(cls, source: Source) -> Moves:
        return cls(source.suite.k, Kernel.of(source.before, source.after), Kernel.of(source.after, source.before))

    def share(self, ranks: Ranks) -> float:
        return float((ranks < self.k).mean())

    def learned(self, ranks: Ranks, gain: float, rng: Generator) -> Ranks:
        """Ranks after an update that learned these items, whose share of hits is higher by ``gain``."""
        wanted = self.share(ranks) + gain
        for _ in range(LEARNING_ROUNDS):
            forward, backward = self.forward.step(ranks, rng), self.backward.step(ranks, rng)
            ranks, reached = self._mixed(ranks, forward, backward, wanted, rng)
            if reached:
                return ranks
        return self.changed(ranks, wanted - self.share(ranks), rng)

    def changed(
        self, ranks: Ranks, change: float, rng: Generator, *, base: Ranks | None = None, back: float = 0.0,
        churn: float = 1.0,
    ) -> Ranks:  # fmt: skip
        """Ranks after an update that learned something else, with a share of hits that is higher by ``change``, to half
        an item where possible: a share of hits has an upper end.

        Args:
            base, back: share of the items that first return to their ranks under the base.
            churn: moves of an item, on average.
        """
        least = max(1, math.ceil(churn))
        wanted = self.share(ranks) + change
        if base is not None:
            ranks = np.where(rng.random(len(ranks))[:, None] < back, base, ranks)
        for number in range(1, MOST_ROUNDS + 1):
            taking = rng.random(len(ranks))[:, None] < churn / least
            one, other = (np.where(taking, kernel.step(ranks, rng), ranks) for kernel in (self.forward, self.backward))
            better = (_statistic(one) >= _statistic(other))[:, None]
            up, down = np.where(better, one, other), np.where(better, other, one)
            ranks, reached = self._mixed(ranks, up, down, wanted, rng)
            if reached and number >= least:
                break
        return ranks

    def _mixed(
        self, ranks: Ranks, up: Ranks, down: Ranks, wanted: float, rng: Generator
    ) -> tuple[Ranks, bool]:  # fmt: skip
        """``up`` for as many drawn items as bring the share of hits closest to the wanted one, ``down`` for the others;
        and whether it is reached, to half an item.
        """
        gains, losses = self._hits(up) - self._hits(ranks), self._hits(down) - self._hits(ranks)
        order = rng.permutation(len(ranks))
        reached = np.concatenate([[0.0], np.cumsum((gains - losses)[order])]) + losses.sum()
        left = (wanted - self.share(ranks)) * len(ranks)
        first = int(np.abs(reached - left).argmin())
        chosen = np.zeros(len(ranks), dtype=bool)
        chosen[order[:first]] = True
        return np.where(chosen[:, None], up, down), bool(abs(reached[first] - left) <= 0.5)

    def _hits(self, ranks: Ranks) -> Floats:
        mean: Floats = (ranks < self.k).mean(axis=1)
        return mean


def _cells(ranks: Ranks) -> NDArray[np.int_]:
    """A number for each combination of about the same ranks: [n]."""
    places = np.searchsorted(np.array(EDGES), ranks, side="right")
    powers = (len(EDGES) + 1) ** np.arange(ranks.shape[1])
    cells: NDArray[np.int_] = places @ powers
    return cells


def _statistic(ranks: Ranks) -> Floats:
    means: Floats = reciprocal_log_rank(ranks).mean(axis=1)
    return means
