"""The papers' figures from scores, which are fractions of 1.

``path`` is [updates + 1, suites]: row 0 is the base, row t the model after update t. ``matrix`` is [updates, suites]:
the rows from 1 on, columns in the order of the stream, so that ``matrix[t, i]`` is the score on the i-th update's suite
after the t-th.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
LEARNED = 0.03
"""The least gain that counts as learned: below it the noise of a suite's items is larger."""


def geometric_mean(a_ka: Floats, a_zs: Floats) -> Floats:
    """FoMo-in-Flux: sqrt(A_KA x A_ZS), of what was learned and what was kept."""
    return np.sqrt(np.asarray(a_ka) * np.asarray(a_zs))


@dataclass(frozen=True)
class Trajectory:
    """FoMo-in-Flux along the stream, each [updates + 1]."""

    a_ka: Floats
    """Mean over adaptation suites."""
    a_zs: Floats
    """Mean over held-out suites."""

    @property
    def gm(self) -> Floats:
        return geometric_mean(self.a_ka, self.a_zs)


def trajectory(adaptation: Floats, held_out: Floats) -> Trajectory:
    return Trajectory(adaptation.mean(axis=1), held_out.mean(axis=1))


@dataclass(frozen=True)
class Mtil:
    """ZSCL, "Preventing Zero-Shot Transfer Degradation in Continual Learning" (Zheng et al. 2023)."""

    transfer: float
    """Mean over suites from the second on of the mean score before their own update."""
    average: float
    last: float


def mtil(matrix: Floats) -> Mtil:
    """Transfer, Avg and Last. Raises ValueError with fewer than two suites, of which none could transfer."""
    suites = matrix.shape[1]
    if suites < 2:
        raise ValueError("Transfer needs two suites")
    before = [matrix[: min(i, len(matrix)), i].mean() for i in range(1, suites)]
    return Mtil(float(np.mean(before)), float(matrix.mean()), float(matrix[-1].mean()))


@dataclass(frozen=True)
class Tic:
    """TiC-CLIP (Garg et al. 2024): means over the diagonal of the matrix, below it and above it."""

    in_domain: float
    backward: float
    """On what was learned earlier."""
    forward: float
    """On what is still to come."""


def tic(matrix: Floats) -> Tic:
    """The three means. Raises ValueError with fewer than two updates, which have nothing backward."""
    updates, suites = matrix.shape
    if updates < 2 or suites < 2:
        raise ValueError("TiC's means need two updates and two suites")
    t, e = np.indices(matrix.shape)
    return Tic(float(matrix[t == e].mean()), float(matrix[e < t].mean()), float(matrix[e > t].mean()))


def forgetting(path: Floats) -> Floats:
    """Two sums for each suite of a chain, over every later update, [suites, 2]: the remaining gain times the update's
    loss, and the squared remaining gain. The ratio of their totals, over any number of chains, is the share of the gain
    that an update of another suite loses: a regression's slope through the origin.

    ``path`` has columns in the order of the stream. Zeros where nothing was learned by more than :data:`LEARNED`.
    """
    sums = np.zeros((path.shape[1], 2))
    for column, scores in enumerate(path.T):
        gains = scores[column + 1 :] - scores[0]
        if len(gains) > 1 and gains[0] >= LEARNED:
            sums[column] = gains[:-1] @ (gains[:-1] - gains[1:]), gains[:-1] @ gains[:-1]
    return sums
