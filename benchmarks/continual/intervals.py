"""Intervals of differences by a paired bootstrap over the items of each suite.

All methods answer the same items, and each draw uses the same items for all methods, so a difference between two
methods is known far better than either score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.continual.metrics import Floats, geometric_mean
from benchmarks.continual.outcomes import Hits, Reference

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A difference with its bounds, in points."""

    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """True if the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def plain(self) -> dict[str, Any]:
        """For JSON, in hundredths of points."""
        bounds = {"value": round(self.value, 2), "low": round(self.low, 2), "high": round(self.high, 2)}
        return {**bounds, "clear": self.clear}


@dataclass(frozen=True)
class Draws:
    """Scores of each method in each draw; row 0 are the items as they are. Arrays are [draws + 1, methods]."""

    names: tuple[str, ...]
    scores: Mapping[str, Floats]
    suites: Mapping[str, Sequence[str]]
    """By figure except ``gm``: the suites that it is the mean of."""

    def of(self, figure: str, without: str = "") -> Floats:
        """``gm``, or a mean over suites, one of which may be left out."""
        if figure == "gm":
            return geometric_mean(self.of("a_ka", without), self.of("a_zs"))
        chosen = [self.scores[suite] for suite in self.suites[figure] if suite != without]
        return np.mean(chosen, axis=0) if chosen else np.zeros_like(next(iter(self.scores.values())))

    def differences(self, figure: str, name: str, other: str, without: str = "") -> Floats:
        """Points that ``name`` scores above ``other``, [draws + 1]."""
        values = self.of(figure, without)
        return 100 * (values[:, self.names.index(name)] - values[:, self.names.index(other)])

    def difference(self, figure: str, name: str, other: str, without: str = "") -> Interval:
        return interval(self.differences(figure, name, other, without))

    def largest(self, name: str, other: str) -> str:
        """The adaptation suite with the largest lead of ``name`` over ``other``."""
        one, two = self.names.index(name), self.names.index(other)
        return max(
            self.suites["a_ka"], key=lambda suite: float(self.scores[suite][0, one] - self.scores[suite][0, two])
        )


def interval(differences: Floats) -> Interval:
    """Of differences [draws + 1], of which the first is that of the items as they are."""
    low, high = np.quantile(differences[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(differences[0]), float(low), float(high))


def resampled(hits: Mapping[str, Hits], reference: Reference, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Resample the items of every suite, for all methods together. ``hits``: by method, then by suite."""
    names, scores = tuple(hits), {}
    rng = np.random.default_rng(seed)
    for suite in (*reference.adaptation, *reference.held_out):
        table = np.stack([hits[name][suite] for name in names], axis=1)
        items = len(table)
        counts = np.vstack([np.ones(items), rng.multinomial(items, np.full(items, 1 / items), size=draws)])
        scores[suite] = counts @ table / items
    suites = {
        "a_ka": reference.adaptation,
        "a_zs": reference.held_out,
        "outside": reference.outside,
        "retrieval": tuple(name for name in reference.adaptation if name not in reference.classes),
        "classes": tuple(name for name in reference.adaptation if name in reference.classes),
    }
    return Draws(names, scores, suites)
