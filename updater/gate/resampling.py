"""The studentised bootstrap of a mean difference, over items or over clusters of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 20_000
"""Bootstrap draws at least; the smallest p value is 1 / (draws + 1)."""

PSEUDO = 0.5
"""Half an item is added at -1 and at +1 before resampling, as Agresti and Min (2005) do for paired proportions:
with no disagreement at all the plain bootstrap would claim certainty from any number of items."""


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """A studentised bootstrap distribution of a mean difference."""

    difference: float
    error: float
    """Standard error of `difference`."""
    pivots: Floats
    """Sorted draws of (mean* - mean) / error*."""

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


def bootstrap(sums: Floats, sizes: Floats | None = None, *, seed: int = 0, draws: int = RESAMPLES) -> Bootstrap:
    """Resample clusters with replacement; the same seed gives the same answer.

    `sums` [clusters] are the summed differences of a cluster's items, and `sizes` [clusters] how many items it has:
    one each by default. The difference is sum(sums) / sum(sizes).
    """
    n = len(sums)
    ones = np.ones(n) if sizes is None else sizes
    usual = float(ones.mean())
    pairs = np.concatenate([np.stack([sums, ones], axis=1), [[-usual, usual], [usual, usual]]])
    values, index = np.unique(pairs, axis=0, return_inverse=True)
    pseudo = index.reshape(-1)[-2:]
    observed = np.bincount(index.reshape(-1), minlength=len(values)).astype(np.float64)
    observed[pseudo] -= 1.0 - PSEUDO  # the two appended clusters weigh half a cluster each
    total, size = values[:, 0], values[:, 1]
    share = observed / observed.sum()
    centre = float(share @ total) / float(share @ size)
    error = math.sqrt(float(share @ (total - centre * size) ** 2) / n) / float(share @ size)
    rng = np.random.default_rng(seed)
    sample = rng.multinomial(n, share, size=draws).astype(np.float64)
    mean = (sample @ total) / (sample @ size)
    sample[:, pseudo] += PSEUDO
    shares = sample / (n + 2 * PSEUDO)
    room = shares @ size
    smooth = (shares @ total) / room
    squares = shares @ total**2 - 2 * smooth * (shares @ (total * size)) + smooth**2 * (shares @ size**2)
    errors = np.sqrt(np.maximum(squares, 1e-30) / n) / room
    pivots = np.sort((mean - centre) / errors)
    return Bootstrap(difference=float(sums.sum() / ones.sum()), error=error, pivots=pivots)
