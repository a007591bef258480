"""Simulated reports, decided by the guard's own test after every ten: callers report answers as right or wrong, the
incumbent's before the release, the release's after it. Some callers are hostile, and report every answer of the new
release as wrong.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest

from core.ledger.feedback import CallerReports
from core.ledger.wrong_answers import ALPHA, Reports, highest_rate, p_value, without_loudest

CALLERS = 30
BEFORE = 1000
"""Reported answers of the incumbent."""
EVERY = 10
EQUAL, HOSTILE, WORSE = "equal", "equal, a tenth hostile", "5 points worse"
SCENARIOS = {EQUAL: (0.0, 0.0), HOSTILE: (0.0, 0.1), WORSE: (0.05, 0.0)}
"""Added rate of wrong answers, and share of hostile callers."""


def first_alarm(callers: npt.NDArray[Any], wrong: npt.NDArray[Any], bound: float) -> int | None:
    """Reports until the guard takes a release back; None: never. ``callers``: numbers of those who reported, in order;
    ``wrong``: whether each report says so; ``bound``: of the incumbent's rate.
    """
    for reported in range(EVERY, len(callers) + 1, EVERY):
        counts = np.bincount(callers[:reported])
        wrongs = np.bincount(callers[:reported], weights=wrong[:reported])
        rows = [CallerReports(str(n), int(wrongs[n]), int(counts[n])) for n in np.flatnonzero(counts)]
        if p_value(Reports.sum(without_loudest(rows)), bound) < ALPHA / 2:
            return reported
    return None


def answers_to_rollback(
    random: np.random.Generator, rate: float, added: float, hostile: float, most: int
) -> int | None:
    """Reported answers until a simulated release is taken back; None: not within ``most``."""
    bound = highest_rate(Reports(int(random.binomial(BEFORE, rate)), BEFORE))
    callers = random.integers(CALLERS, size=most)
    wrong = (random.random(most) < rate + added) | (callers < hostile * CALLERS)
    return first_alarm(callers, wrong, bound)


def simulate(streams: int, most: int, rate: float) -> dict[str, Any]:
    """Figures by scenario: how many of the streams are taken back, and after how many reports."""
    rows = {}
    for index, (name, (added, hostile)) in enumerate(SCENARIOS.items()):
        random = np.random.default_rng(index)
        needed = [answers_to_rollback(random, rate, added, hostile, most) for _ in range(streams)]
        taken = [each for each in needed if each is not None]
        low, high = binomtest(len(taken), streams).proportion_ci(0.95)
        rows[name] = {
            "taken_back": len(taken), "share": len(taken) / streams, "interval": [float(low), float(high)],
            "answers": [float(each) for each in np.quantile(taken, [0.5, 0.05, 0.95])] if taken else None,
        }  # fmt: skip
    return rows
