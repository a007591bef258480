"""Intervals of differences by a paired bootstrap: over the items of each suite, or over suites and chains as well.

All methods answer the same items, and each draw uses the same items, suites and chains for all methods, so a difference
between two methods is known far better than either score.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
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
    drawn: Mapping[str, Floats]
    """By suite, how often each draw has it, [draws + 1]."""

    def of(self, figure: str, without: Collection[str] = ()) -> Floats:
        """``gm``, or a mean over suites but those of ``without``."""
        if figure == "gm":
            return geometric_mean(self.of("a_ka", without), self.of("a_zs"))
        chosen = [suite for suite in self.suites[figure] if suite not in without]
        if not chosen:
            return np.zeros_like(next(iter(self.scores.values())))
        times = np.stack([self.drawn[suite] for suite in chosen])
        times[:, times.sum(axis=0) == 0] = 1  # a draw without any of these suites
        scores = np.stack([self.scores[suite] for suite in chosen])
        mean: Floats = np.einsum("sd,sdm->dm", times / times.sum(axis=0), scores)
        return mean

    def differences(self, figure: str, name: str, other: str, without: Collection[str] = ()) -> Floats:
        """Points that ``name`` scores above ``other``, [draws + 1]."""
        values = self.of(figure, without)
        return 100 * (values[:, self.names.index(name)] - values[:, self.names.index(other)])

    def difference(self, figure: str, name: str, other: str, without: Collection[str] = ()) -> Interval:
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


def resampled(
    hits: Mapping[str, Sequence[Hits]], reference: Reference, draws: int = DRAWS, seed: int = 0, wide: bool = False
) -> Draws:
    """Resample the items of every suite, for all methods together. ``hits``: by method, for each of its chains (as many
    of all methods, in the same order), by suite. ``wide``: resample suites, within the adaptation and the held-out
    ones, and chains (orders and seeds) as well: what other suites and other chains would have shown."""
    names, scores = tuple(hits), {}
    rng, pick = np.random.default_rng(seed), np.random.default_rng(seed + 1)

    def drawn(count: int) -> Floats:
        """How often each draw has each of ``count`` chains or suites, [draws + 1, count]."""
        once = np.ones((draws + 1, count))
        if wide and count:
            once[1:] = pick.multinomial(count, np.full(count, 1 / count), size=draws)
        return once

    chains = drawn(len(hits[names[0]]))
    chains /= chains.sum(axis=1, keepdims=True)
    groups = (reference.adaptation, reference.unseen, reference.held_out)
    for suite in chain.from_iterable(groups):
        table = np.stack([[each[suite] for each in hits[name]] for name in names])  # [methods, chains, items]
        items = table.shape[2]
        counts = np.vstack([np.ones(items), rng.multinomial(items, np.full(items, 1 / items), size=draws)])
        each_chain = np.einsum("mci,di->dmc", table, counts, optimize=True) / items
        scores[suite] = np.einsum("dmc,dc->dm", each_chain, chains)
    suites = {
        "a_ka": reference.adaptation,
        "a_zs": reference.held_out,
        "unseen": reference.unseen,
        "outside": reference.outside,
        "retrieval": tuple(name for name in reference.adaptation if name not in reference.classes),
        "classes": tuple(name for name in reference.adaptation if name in reference.classes),
    }
    often = {name: column for group in groups for name, column in zip(group, drawn(len(group)).T, strict=True)}
    return Draws(names, scores, suites, often)
