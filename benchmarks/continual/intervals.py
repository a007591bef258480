"""Intervals of differences by a paired bootstrap over the items of each suite.

All methods answer the same items, so every draw takes the same ones for all of them: a difference between two methods
is far better known than either score.
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
        """Whether it lies on one side of zero."""
        return self.low > 0 or self.high < 0

    def plain(self) -> dict[str, Any]:
        """For JSON, in hundredths of points."""
        bounds = {"value": round(self.value, 2), "low": round(self.low, 2), "high": round(self.high, 2)}
        return {**bounds, "clear": self.clear}


@dataclass(frozen=True)
class Draws:
    """Scores of each method in each draw; row 0 are the items as they are. Arrays are [draws + 1, methods]."""

    names: tuple[str, ...]
    a_ka: Floats
    a_zs: Floats

    def of(self, figure: str) -> Floats:
        """``a_ka``, ``a_zs``, or ``gm``."""
        if figure == "gm":
            return geometric_mean(self.a_ka, self.a_zs)
        return {"a_ka": self.a_ka, "a_zs": self.a_zs}[figure]

    def difference(self, figure: str, name: str, other: str) -> Interval:
        """How much higher ``name`` scores than ``other``, percentile interval."""
        values = self.of(figure)
        differences = 100 * (values[:, self.names.index(name)] - values[:, self.names.index(other)])
        low, high = np.quantile(differences[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(float(differences[0]), float(low), float(high))


def resampled(hits: Mapping[str, Hits], reference: Reference, draws: int = DRAWS, seed: int = 0) -> Draws:
    """Draw the items of every suite anew, for all methods together. ``hits``: by method, then by suite."""
    names = tuple(hits)

    def mean_over(suites: Sequence[str], rng: np.random.Generator) -> Floats:
        total = np.zeros((draws + 1, len(names)))
        for suite in suites:
            table = np.stack([hits[name][suite] for name in names], axis=1)
            items = len(table)
            counts = np.vstack([np.ones(items), rng.multinomial(items, np.full(items, 1 / items), size=draws)])
            total += counts @ table / items
        return total / len(suites)

    rng = np.random.default_rng(seed)
    return Draws(names, mean_over(reference.adaptation, rng), mean_over(reference.held_out, rng))
