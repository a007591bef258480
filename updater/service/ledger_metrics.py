"""What the ledger knows of learning, as gauges.

The last verdict and the last update's cost stay true when the updater restarts, and when another process made them
(`ratchet trainer --once`); so they are exported from the ledger, and not by whoever wrote them there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from core import metrics
from core.ledger import Ledger, VerdictRow
from core.metrics.learning import Score
from core.settings import Settings
from updater.recipes import Family
from updater.service import triggers

VERDICTS = 500
"""Verdicts that are looked through for the last one with each outcome."""


class LedgerMetrics:
    """Exports them when they have changed."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._exported: tuple[Any, ...] = ()

    def export(self, families: Iterable[Family]) -> None:
        """Look at the ledger, and export what is new."""
        newest = [(row.id, row.state) for row in self.ledger.updates(1)], [row.id for row in self.ledger.verdicts(1)]
        if newest == self._exported:
            return
        verdicts = self.ledger.verdicts(VERDICTS)
        for family in families:
            costs = [row.cost for row in self.ledger.updates(family=family) if "gflops_spent" in row.cost]
            if costs:
                metrics.update.cost(family, costs[0]["gflops_planned"], costs[0]["gflops_spent"])
            own = [row for row in verdicts if row.adapter.startswith(f"{family}-")]
            if own:
                metrics.gate.scored(family, _scores(own[0]))
                metrics.gate.shifted(family, _shifts(own[0]))
            for row in reversed(own):
                metrics.gate.last(family, row.outcome, row.created_at.timestamp())
        self._exported = newest


def export_budget(settings: Settings, ledger: Ledger) -> None:
    """How full the bucket is, and what the next update takes from it."""
    rate, capacity = triggers.bucket(settings)
    level = ledger.bucket_level(time.time(), rate, capacity)
    metrics.update.budget(level, capacity, triggers.planned_gflops(settings))


def _scores(verdict: VerdictRow) -> list[Score]:
    return [
        Score(name, suite["role"], suite["base"], suite["before"], suite["after"], suite.get("margin_left"))
        for name, suite in verdict.summary.get("suites", {}).items()
    ]


def _shifts(verdict: VerdictRow) -> dict[str, tuple[float, float]]:
    """By tower; none of a VLM, nor of a candidate that was not scored, nor of an earlier version's verdict."""
    shift = (verdict.summary.get("diagnostics") or {}).get("shift")
    towers = shift["towers"] if shift else {}
    return {tower: (moved["from_incumbent"], moved["from_base"]) for tower, moved in towers.items()}
