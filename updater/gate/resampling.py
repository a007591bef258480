"""The studentised bootstrap of a mean difference, over items or clusters of them, and over strata."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 20_000
"""Bootstrap draws at least; the smallest p value is 1 / (draws + 1)."""

PSEUDO = 0.5
"""Half an item is added at -1 and at +1 before resampling, as Agresti and Min (2005) do for paired proportions:
with no disagreement at all the plain bootstrap would claim certainty from any number of items. Where outcomes are no
hits and misses it is added at the largest difference that was seen (`reach`): at +-1 it would hide what 50 items show
of a rank statistic, and at the differences' root mean square a test at 3% would be one at 6% (both by simulation)."""

CELLS = 250_000
"""Numbers of a chunk of draws: 2 MB, which stay in a core's cache. Chunks of 32 MB take ten times as long."""


@dataclass(frozen=True)
class Bootstrap:
    """A bootstrap distribution of a mean difference, studentised: each draw is divided by its own standard error."""

    difference: float
    error: float
    """Standard error of `difference`."""
    moves: Floats
    """[draws]: each draw's mean less the mean that was drawn from."""
    errors: Floats
    """[draws]: each draw's own standard error."""

    @cached_property
    def pivots(self) -> Floats:
        """Sorted draws of (mean* - mean) / error*."""
        return np.sort(self.moves / self.errors)

    def p_above(self, value: float) -> float:
        """One-sided p of H0: the difference is at most `value`."""
        t = (self.difference - value) / self.error
        beyond = len(self.pivots) - int(np.searchsorted(self.pivots, t, side="left"))
        return (beyond + 1) / (len(self.pivots) + 1)

    def p_below(self, value: float) -> float:
        """One-sided p of H0: the difference is at least `value`."""
        t = (self.difference - value) / self.error
        beyond = int(np.searchsorted(self.pivots, t, side="right"))
        return (beyond + 1) / (len(self.pivots) + 1)

    def low(self, level: float) -> float:
        """Lower one-sided bound: the smallest value that `p_above` does not refuse at `level`."""
        count = len(self.pivots)
        beyond = math.floor(level * (count + 1)) - 1  # draws that may lie at or beyond the bound
        pivot = self.pivots[count - 1 - max(beyond, 0)]
        return max(self.difference - float(pivot) * self.error, -1.0)

    def high(self, level: float) -> float:
        """Upper one-sided bound."""
        count = len(self.pivots)
        beyond = math.floor(level * (count + 1)) - 1
        return min(self.difference - float(self.pivots[max(beyond, 0)]) * self.error, 1.0)


def bootstrap(
    sums: Floats, sizes: Floats | None = None, *, reach: float = 1.0, seed: int = 0, draws: int = RESAMPLES
) -> Bootstrap:
    """Resample clusters with replacement; the same seed gives the same answer.

    `sums` [clusters] are the summed differences of a cluster's items, and `sizes` [clusters] how many items it has:
    one each by default. The difference is sum(sums) / sum(sizes). `reach` is the difference of an item at which half an
    item is added, see PSEUDO.
    """
    n = len(sums)
    ones = np.ones(n) if sizes is None else sizes
    usual = float(ones.mean())
    pairs = np.concatenate([np.stack([sums, ones], axis=1), [[-reach * usual, usual], [reach * usual, usual]]])
    values, index = np.unique(pairs, axis=0, return_inverse=True)
    index = index.reshape(-1)
    pseudo = index[-2:]
    observed = np.bincount(index, minlength=len(values)).astype(np.float64)
    observed[pseudo] -= 1.0 - PSEUDO  # the two appended clusters weigh half a cluster each
    total, size = values[:, 0], values[:, 1]
    share = observed / observed.sum()
    centre = float(share @ total) / float(share @ size)
    error = math.sqrt(float(share @ (total - centre * size) ** 2) / n) / float(share @ size)
    moments = np.stack([total, size, total**2, total * size, size**2], axis=1)
    drawn = _sums(moments, index, share, n, seed, draws)
    moves = drawn[:, 0] / drawn[:, 1] - centre
    smooth = (drawn + PSEUDO * moments[pseudo].sum(axis=0)) / (n + 2 * PSEUDO)
    mean = smooth[:, 0] / smooth[:, 1]
    squares = smooth[:, 2] - 2 * mean * smooth[:, 3] + mean**2 * smooth[:, 4]
    errors = np.sqrt(np.maximum(squares, 1e-30) / n) / smooth[:, 1]
    return Bootstrap(difference=float(sums.sum() / ones.sum()), error=error, moves=moves, errors=errors)


def stratified(strata: Sequence[Bootstrap], weights: Sequence[float]) -> Bootstrap:
    """The weighted mean of the differences of strata that were drawn independently, with as many draws each.

    The variances of strata add up, weighted by the squared weights (Cochran, Sampling Techniques, 1977, 5.3).
    """
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    return Bootstrap(
        difference=float(shares @ [each.difference for each in strata]),
        error=math.sqrt(float(shares**2 @ [each.error**2 for each in strata])),
        moves=shares @ np.stack([each.moves for each in strata]),
        errors=np.sqrt(shares**2 @ np.stack([each.errors for each in strata]) ** 2),
    )


def _sums(moments: Floats, index: NDArray[np.int_], share: Floats, n: int, seed: int, draws: int) -> Floats:
    """Sums of `moments` [values, 5] over `n` drawn clusters: [draws, 5].

    A draw is a multinomial count of the different values. Where there are few of them it is drawn as such; where
    nearly every cluster has its own, drawing the clusters and counting them is several times faster.
    """
    rng = np.random.default_rng(seed)
    count = len(moments)
    few = 5 * count < n
    chunk = max(1, CELLS // (count if few else n))
    # 2n + 2 equal lots: two for each cluster, one for each of the two appended ones
    value_of_lot = np.concatenate([np.repeat(index[:n], 2), index[n:]])
    width = np.uint16 if len(value_of_lot) <= np.iinfo(np.uint16).max else np.int64
    parts = []
    for start in range(0, draws, chunk):
        rows = min(chunk, draws - start)
        if few:
            counts = rng.multinomial(n, share, size=rows)
        else:
            lots = rng.integers(len(value_of_lot), size=(rows, n), dtype=width)
            places = value_of_lot[lots] + count * np.arange(rows)[:, None]
            counts = np.bincount(places.ravel(), minlength=rows * count).reshape(rows, count)
        parts.append(counts.astype(np.float64) @ moments)
    return np.concatenate(parts)
