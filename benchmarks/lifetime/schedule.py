"""When a candidate is trained and asked, and at which level."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from core.ledger import VerdictRow
from core.settings.updates import Gate
from updater.gate.interim_analyses import AnalysisPlan, InterimAnalysis, candidate_alpha, needed_items
from updater.service.triggers import spread

PATIENCE = 4
"""Triggers that a new sample waits, at most, for the items that a gain needs: as many as `updater.max_wait_seconds` has
where one comes every quarter of an hour."""


@dataclass(slots=True)
class Schedule:
    """What a stream's updater knows of the looks since the last release.

    Two ways. *Waiting*: a candidate is trained when there are the items that a gain of ``gate.detect`` needs, or when
    data have waited long enough; one that is inconclusive is asked again as further items arrive. Else as before: each
    trigger trains one, which is asked once.
    """

    settings: Gate
    waiting: bool
    candidates: int = 0
    """That were tested since the last release."""
    spent: float = 0.0
    """Of alpha since the last release."""
    history: list[float] = field(default_factory=list)
    """Spent before each release."""
    due: int | None = None
    """Items with which a candidate that was inconclusive is asked again; None: there is none."""
    verdicts: list[VerdictRow] = field(default_factory=list)
    """Of all looks, the newest first."""
    _plan: AnalysisPlan | None = None
    """Of the candidate that was asked last."""
    _waited: int = 0

    def plan(self) -> AnalysisPlan:
        """Of a candidate that will be trained."""
        alpha = candidate_alpha(self.settings.alpha, self.candidates)
        if not self.waiting:
            return AnalysisPlan(alpha, self.settings.alpha, 1, (), self.candidates, only=True)
        needed = needed_items(
            spread(self.verdicts), detect=self.settings.detect, alpha=alpha,
            fewest=self.settings.min_items, most=self.settings.max_items,
        )  # fmt: skip
        return AnalysisPlan(alpha, self.settings.alpha, needed, (), self.candidates)

    def triggered(self, items: int) -> InterimAnalysis | None:
        """A trigger has come: the look that is made with so many fresh items; None: wait."""
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
        """A look was made. ``tested``: whether its tests could be made, so that it has spent."""
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
