"""Interim analyses of a candidate: the items that a test needs, and the part of alpha that each look spends.

A look is one gate run whose tests were possible. Two rules bound the chance of a false accept:

- *Over the looks at one candidate*: the alpha-spending function of Lan and DeMets (Biometrika 70, 1983, 659-663) of
  O'Brien-Fleming type, by the share of the needed independent items that a look has. Levels follow from the joint
  distribution of the looks by numerical integration (Armitage, McPherson and Rowe, JRSS A 132, 1969, 235-244), for
  independent increments; a suite with unchanged items is tested more strictly than needed (Slepian's inequality).
- *Over the candidates* since the last release: :func:`candidate_alpha`. A candidate takes its whole share with its
  first look and returns none of it, because the number of later looks may depend on the answers.

The tests that exclude a loss have the whole alpha for each candidate, shared over its looks only: the number of items
in retention suites does not grow. Reasons: docs/gate.md, "Alpha".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from updater.gate.statistics import POWER, items_needed

PRIOR_SPREAD = 0.25
"""Standard deviation of one item's difference until a verdict has measured it. Conservative: hits of gentle updates
have 0.1 to 0.24 (docs/benchmarks/gate), and the rank statistic needs fewer items."""
RANK_EFFICIENCY = 2.6
"""Items in hits that are worth one item in 1/log2(2 + rank)."""
LOOKS = 4
"""An inconclusive candidate is asked again with each further quarter of the needed items."""
LEAST_LEVEL = 1e-9
"""A look with less to spend spends nothing."""
POINTS = 300
"""Points of the numerical integration: levels are exact to six digits for looks a hundredth of the items apart."""
REACH = 8.0
"""Start of the integration, in standard deviations below zero."""


@dataclass(frozen=True, slots=True)
class InterimAnalysis:
    number: int
    items: int
    needed: int
    """Items of the last look, fixed with the first."""
    alpha: float
    level: float
    loss_alpha: float
    loss_level: float
    before: float
    spent: float

    @property
    def next(self) -> int | None:
        """Items for the next look if this one is inconclusive; None if it was the last."""
        further = self.items + math.ceil(self.needed / LOOKS)
        return None if self.items >= self.needed else min(self.needed, further)


@dataclass(frozen=True, slots=True)
class AnalysisPlan:
    alpha: float
    loss_alpha: float
    """Budget of all looks for each test that excludes a loss: ``gate.alpha``."""
    needed: int
    tested: tuple[int, ...] = ()
    candidates: int = 0
    only: bool = False

    @classmethod
    def alone(cls, alpha: float) -> AnalysisPlan:
        return cls(candidate_alpha(alpha, 0), alpha, 1, only=True)

    def look(self, items: int) -> InterimAnalysis:
        """The next look, with ``items``. Its levels are 0 if they are no more than before."""
        items = max(1, items)
        needed, counts = items if self.only else self.needed, (*self.tested, items)
        level, loss_level = (_levels(each, counts, needed)[-1] for each in (self.alpha, self.loss_alpha))
        before, spent = (spending(self.alpha, max([0, *each]) / needed) for each in (self.tested, counts))
        return InterimAnalysis(
            len(counts), items, needed, self.alpha, level, self.loss_alpha, loss_level, before, spent
        )  # fmt: skip


def candidate_alpha(alpha: float, candidates: int) -> float:
    """Alpha that all looks at a candidate may spend on its gain, after `candidates` others since the last release. The
    series alpha * 6 / (pi^2 (k+1)^2) sums to alpha over infinitely many candidates, so the chance that one without a
    gain passes before the next release stays below alpha. It falls slowly (alpha / 2^k would leave nothing after ten).
    """
    if candidates < 0:
        raise ValueError(f"candidates is {candidates}: it counts those that were looked at before")
    return alpha * 6.0 / (math.pi**2 * (candidates + 1) ** 2)


def alpha_left(alpha: float, candidates: int) -> float:
    """Alpha left for further candidates after ``candidates`` have taken their shares since the last release."""
    return alpha - sum(candidate_alpha(alpha, k) for k in range(candidates))


def needed_items(
    spread: float | None, *, detect: float, alpha: float, power: float = POWER, fewest: int = 1, most: int | None = None
) -> int:
    """Items, from `fewest` to `most`, with which one look at `alpha` shows a true gain of `detect` with probability
    `power`. ``alpha``: what the candidate may spend (:func:`candidate_alpha`). ``spread``: standard deviation of one
    item's difference; None: PRIOR_SPREAD. At least that of a gain of `detect` without any loss is used, a variance of d
    (1 - d) in hits: earlier candidates may have changed less."""
    least = math.sqrt(detect * (1.0 - detect) / RANK_EFFICIENCY)
    wanted = max(fewest, items_needed(max(PRIOR_SPREAD if spread is None else spread, least), detect, alpha, power))
    return wanted if most is None else min(wanted, max(most, fewest))


def spending(alpha: float, fraction: float) -> float:
    """Alpha that may be spent up to an information fraction: 2 - 2 Phi(z(alpha / 2) / sqrt(fraction))."""
    if not 0.0 < fraction < 1.0:
        return alpha if fraction >= 1.0 else 0.0  # exactly: what is left then is 0
    return float(2.0 * stats.norm.sf(stats.norm.isf(alpha / 2.0) / math.sqrt(fraction)))


def _levels(alpha: float, looks: Sequence[int], needed: int) -> list[float]:
    """One-sided levels of looks with these items, for a Brownian motion at the times looks / needed."""
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    places, masses = np.zeros(1), np.ones(1)  # where the motion is, of the paths that have not crossed
    time, spent = 0.0, 0.0
    levels = []
    for items in looks:
        step, allowed = items / needed - time, spending(alpha, items / needed)
        if step <= 0.0 or allowed - spent < LEAST_LEVEL:
            levels.append(0.0)
            continue
        time, deviation = items / needed, math.sqrt(step)
        bound = _bound(places, masses, deviation, allowed - spent)
        levels.append(float(stats.norm.sf(bound / math.sqrt(time))))
        low = -REACH * math.sqrt(time)
        grid = low + (bound - low) * (nodes + 1.0) / 2.0
        density = stats.norm.pdf(grid[:, None], places, deviation) @ masses
        places, masses, spent = grid, density * weights * (bound - low) / 2.0, allowed
    return levels


def _bound(places: NDArray[np.float64], masses: NDArray[np.float64], deviation: float, chance: float) -> float:
    """Bound that the motion exceeds after one more step with probability ``chance``."""

    def excess(bound: float) -> float:
        return float(stats.norm.sf(bound, places, deviation) @ masses) - chance

    return float(optimize.brentq(excess, -REACH, REACH * (1.0 + deviation), xtol=1e-12))
