"""What suites can show: the smallest loss and the smallest gain that the gate sees, by its own statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass

from core.settings.updates import Gate
from updater.gate.interim_analyses import PRIOR_SPREAD, candidate_alpha, needed_items
from updater.gate.statistics import items_needed, smallest_difference
from updater.gate.suites import Suite


@dataclass(frozen=True)
class SuitePower:
    """What one retention suite can show with the usual chance (POWER)."""

    suite: Suite
    items: int
    units: int
    """Items that are independent of each other: each, or each caption."""
    excludes: float
    """The smallest loss that is excluded where nothing has changed; a share."""
    margin: float
    needed: int
    """Independent items with which the margin is excluded."""
    min_items: int

    @property
    def enough(self) -> bool:
        """Whether an update that changes nothing passes it, with the usual chance."""
        return self.units >= max(self.needed, self.min_items)

    @property
    def advice(self) -> str:
        """What to do where there are too few items; else empty."""
        if self.enough:
            return ""
        wider = math.ceil(100 * self.excludes) / 100
        more = f"give {max(self.needed, self.min_items):,} or more that are independent"
        if self.units < self.min_items:
            return f"with fewer than {self.min_items} (gate.min_items) nothing is decided: {more}"
        return f"updates will be inconclusive: {more}, or allow a larger loss with --margin {wider:g}"


def suite_power(suite: Suite, gate: Gate) -> SuitePower:
    """Reads the suite's items. The level is that of a single look, the spread what the gate assumes."""
    level, units = gate.alpha, suite.units()
    margin = suite.margin or gate.margin
    return SuitePower(
        suite=suite,
        items=len(suite.items()),
        units=units,
        excludes=smallest_difference(PRIOR_SPREAD, units, level),
        margin=margin,
        needed=items_needed(PRIOR_SPREAD, margin, level),
        min_items=gate.min_items,
    )


def fresh_needed(gate: Gate) -> int:
    """Held-out new pairs with which the first candidate's gain of ``gate.detect`` shows."""
    level = candidate_alpha(gate.alpha, 0)
    return needed_items(None, detect=gate.detect, alpha=level, fewest=gate.min_items, most=gate.max_items)
