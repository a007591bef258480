"""When a candidate is trained and asked, and at which level."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from scipy import stats

from ops.settings import Gate
from updater.gate.interim_analyses import Look, candidate_alpha, look, needed_items
from updater.gate.verdict import PooledGain

POWER = 0.8
PATIENCE = 4
"""Triggers that a new sample waits, at most, for the items that a gain needs: as many as `updater.max_wait_seconds` has
where one comes every quarter of an hour."""
RECENT = 10
"""Verdicts from which the spread is taken."""


@dataclass(slots=True)
class Schedule:
    """What a stream's updater knows of the looks since the last release.

    Two ways. *Waiting*: a candidate is trained when there are the items that a gain of ``detect`` needs, or when data
    have waited long enough; one that is inconclusive is asked again as further items arrive. Else as before: each
    trigger trains one, which is asked once.
    """

    settings: Gate
    detect: float
    waiting: bool
    candidates: int = 0
    """That were tested since the last release."""
    spent: float = 0.0
    """Of alpha since the last release."""
    history: list[float] = field(default_factory=list)
    """Spent before each release."""
    kept: Look | None = None
    """The last look at a candidate that may be asked again."""
    _tested: list[int] = field(default_factory=list)
    _spreads: list[tuple[int, float]] = field(default_factory=list)
    _waited: int = 0

    @property
    def spread(self) -> float | None:
        """Standard deviation of one item's difference, pooled over the newest verdicts."""
        recent = self._spreads[-RECENT:]
        units = sum(count for count, _ in recent)
        return math.sqrt(sum(count * value**2 for count, value in recent) / units) if units else None

    @property
    def needed(self) -> int:
        """Items that the next candidate needs."""
        return needed_items(
            self.spread, detect=self.detect, alpha=candidate_alpha(self.settings.alpha, self.candidates), power=POWER,
            fewest=self.settings.min_items, most=self.settings.max_items,
        )  # fmt: skip

    def triggered(self, items: int) -> Look | None:
        """A trigger has come: the look that is made with so many fresh items; None: wait."""
        if self.kept is not None:
            due = self.kept.next
            return look(self.kept.alpha, self._tested, items, self.kept.needed) if due and items >= due else None
        alpha = candidate_alpha(self.settings.alpha, self.candidates)
        if not self.waiting:
            return Look(1, items, items, alpha, alpha, alpha)
        self._waited += 1
        needed = self.needed
        if items < needed and self._waited < PATIENCE:
            return None
        self._waited = 0
        return look(alpha, [], items, needed)

    def looked(self, look: Look, gain: PooledGain | None, *, tested: bool, released: bool, again: bool) -> None:
        """A look was made.

        Args:
            tested: whether its tests could be made.
            again: whether the candidate may be asked again, as it is inconclusive.
        """
        if gain is not None:
            self._spreads.append((gain.units, _spread(gain)))
        if tested:
            if self.kept is None:
                self.candidates += 1
            self.spent += look.spent - (self.kept.spent if self.kept is not None else 0.0)
            self._tested.append(look.items)
        if released:
            self.history.append(self.spent)
            self.candidates, self.spent = 0, 0.0
        if again and self.waiting and look.next is not None:
            self.kept = look
        else:
            self.drop()

    def drop(self) -> None:
        """The candidate is not asked again."""
        self.kept, self._tested = None, []


def _spread(gain: PooledGain) -> float:
    """Of one item's difference, from the lower bound of the mean."""
    change = gain.statistic
    reach = change.difference - change.ci_low
    return float(max(reach, 1e-3) / stats.norm.isf(gain.alpha) * math.sqrt(gain.units))
