"""What each of several looks may spend of alpha, so that looking again and again keeps the chance of a false accept."""

from __future__ import annotations

import math


def spend(alpha: float, looks: int) -> float:
    """The level of this look, when `looks` verdicts have fallen since the last release.

    The series alpha * 6 / (pi^2 (k+1)^2) sums to alpha over endlessly many looks: however long an updater tries,
    the chance that a bad candidate slips in before the next release stays below alpha. It starts at 0.61 alpha and
    falls slowly (alpha / 2^k would leave nothing after ten tries).
    """
    if looks < 0:
        raise ValueError(f"looks is {looks}: it counts earlier verdicts")
    return alpha * 6.0 / (math.pi**2 * (looks + 1) ** 2)
