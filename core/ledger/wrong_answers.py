"""Compares the rates of wrong answers that callers report, before and after a time or a release.

Reports come slowly, and are looked at all the time, so the test is valid at any time. The earlier rate of wrong answers
is bounded from above once (Clopper and Pearson, half of :data:`ALPHA`). Against that bound p, a mixture of likelihood
ratios over all higher rates is a martingale (Robbins, Ann. Math. Stat. 41, 1970), so by Ville's inequality it ever
exceeds 2 / ALPHA with a chance of at most ALPHA / 2.

A caller that wants answers to look bad may report all of them: the fifth of the callers that report most as wrong does
not count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from core.ledger.feedback import CallerReports
from core.ledger.rows import Family

ALPHA: Final = 0.01
"""Highest probability of an alarm where answers are wrong no more often than before, however long one looks."""
LEFT_OUT: Final = 0.2
ROUTES: Final[dict[Family, tuple[str, ...]]] = {"clip": ("embeddings", "classify", "search"), "vlm": ("chat", "vqa")}


@dataclass(frozen=True, slots=True)
class Reports:
    wrong: int
    of: int
    """Right or wrong."""

    @classmethod
    def sum(cls, callers: Sequence[CallerReports]) -> Reports:
        return cls(sum(each.wrong for each in callers), sum(each.of for each in callers))


def without_loudest(callers: Sequence[CallerReports]) -> list[CallerReports]:
    loudest = sorted(callers, key=lambda each: (each.wrong, each.caller), reverse=True)
    return loudest[int(LEFT_OUT * len(loudest)) :]


def highest_rate(reports: Reports) -> float:
    """Upper bound of a rate of wrong answers, which is too low with a chance of ALPHA / 2."""
    from scipy.special import betaincinv  # here, because most importers only need the types

    right = reports.of - reports.wrong
    return float(betaincinv(reports.wrong + 1, right, 1 - ALPHA / 2)) if right else 1.0


def p_value(reports: Reports, rate: float) -> float:
    """Of H0: answers are wrong with at most this rate; valid at any time."""
    from scipy.special import betaincc, betaln

    wrong, right = reports.wrong, reports.of - reports.wrong
    if not 0 < rate < 1:
        return 1.0
    higher = float(betaincc(wrong + 1, right + 1, rate))
    if higher <= 0:
        return 1.0
    mixture = float(betaln(wrong + 1, right + 1)) + math.log(higher) - math.log1p(-rate)
    return min(1.0, math.exp(min(0.0, wrong * math.log(rate) + right * math.log1p(-rate) - mixture)))
