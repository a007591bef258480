"""The guardrail ``feedback``: callers report more of a release's answers as wrong than of its incumbent's, whose rate
is bounded once, from what was reported before the release. It takes a release back that is wrong no more often than its
incumbent with a chance of at most :data:`ALPHA`, see :mod:`core.ledger.wrong_answers`."""

from __future__ import annotations

from core.ledger import Ledger
from core.ledger.wrong_answers import ALPHA, ROUTES, Reports, highest_rate, p_value, without_loudest
from serving.releases.guard import Evidence, GuardTarget
from serving.releases.types import FAMILIES


def feedback_evidence(ledger: Ledger, target: GuardTarget) -> list[Evidence]:
    """Test the reports on each model that the release changes, if there are reports on both releases."""
    found = []
    for family in FAMILIES:
        if not target.differs(family):
            continue
        callers = ledger.feedback_by_caller(target.release.number, ROUTES[family])
        ours = Reports.sum(without_loudest(callers))
        theirs = Reports.sum(
            ledger.feedback_by_caller(target.incumbent.number, ROUTES[family], before=target.release.created_at)
        )
        if ours.of and theirs.of:
            rate = highest_rate(theirs)
            shown = (
                f"{ours.wrong} of {ours.of} reported answers are wrong, {theirs.wrong} of {theirs.of} of release "
                f"{target.incumbent.number}, at most {rate:.1%}"
            )
            chance = p_value(ours, rate)
            found.append(Evidence("feedback", family, ours.wrong, ours.of, round(rate, 6), chance, ALPHA / 2, shown))
    return found
