"""When a candidate is trained and evaluated, and at which level."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from core.ledger import VerdictRow
from core.settings.updates import Gate
from updater.gate.interim_analyses import AnalysisPlan, InterimAnalysis, candidate_alpha, needed_items
from updater.service.triggers import spread

PATIENCE = 4
"""Triggers that a new sample waits, at most, for the items that a gain needs: `updater.max_wait_seconds` with a trigger
every 15 minutes."""


@dataclass(slots=True)
class Schedule:
    """An updater's record of the looks since the last release.

    With *waiting*, a candidate is trained when there are the items that a gain of ``gate.detect`` needs, or when data
    have waited long enough; an inconclusive one is evaluated again as further items arrive. Otherwise each trigger
    trains a candidate that is evaluated once.
    """

    settings: Gate
    waiting: bool
    candidates: int = 0
    spent: float = 0.0
    history: list[float] = field(default_factory=list)
    """Spent before each release."""
    due: int | None = None
    """Number of items at which an inconclusive candidate is evaluated again; None: there is none."""
    verdicts: list[VerdictRow] = field(default_factory=list)
    """Of all looks, the newest first."""
    _plan: AnalysisPlan | None = None
    """Of the candidate that was evaluated last."""
    _waited: int = 0

    def plan(self) -> AnalysisPlan:
        alpha = candidate_alpha(self.settings.alpha, self.candidates)
        if not self.waiting:
            return AnalysisPlan(alpha, self.settings.alpha, 1, (), self.candidates, only=True)
        needed = needed_items(
            spread(self.verdicts), detect=self.settings.detect, alpha=alpha,
            fewest=self.settings.min_items, most=self.settings.max_items,
        )  # fmt: skip
        return AnalysisPlan(alpha, self.settings.alpha, needed, (), self.candidates)

    def triggered(self, items: int) -> InterimAnalysis | None:
        """The look of a trigger with this many fresh items; None: wait."""
        if self.due is not None:
            assert self._plan is not None, "it was asked before"
            return self._plan.look(items) if items >= self.due else None
        plan = self.plan()
        self._waited += 1
        if self.waiting and items < plan.needed and self._waited < PATIENCE:
            return None
        self._plan, self._waited = plan, 0
        return plan.look(items)

    def looked(self, look: InterimAnalysis, verdict: VerdictRow, *, tested: bool) -> None:
        """Record a look. ``tested``: whether its tests were possible, so that it has spent alpha."""
        assert self._plan is not None, "it was planned"
        self.verdicts.insert(0, verdict)
        if tested:
            self.candidates += not self._plan.tested
            self.spent += look.spent - look.before
            self._plan = replace(self._plan, tested=(*self._plan.tested, look.items))
        self.due = look.next if verdict.outcome == "inconclusive" else None
        if verdict.outcome == "passed":
            self.history.append(self.spent)
            self.candidates, self.spent = 0, 0.0
