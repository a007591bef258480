"""Candidates of a producer that labels a new domain systematically wrong, its held-out items included.

They learn the falsehood and gain on the held-out items, so no test on these items keeps them out. The base can: it is
right about true labels more often than by chance, and about such false ones not. Where it is not, a person decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.gate.cases import Case, Rule, hits_of, judge
from benchmarks.gate.plans import GatePlan
from benchmarks.gate.stock import trained
from benchmarks.gate.trial import Workshop
from updater.gate.suites import Suite
from updater.gate.trust import agreement


def measure(workshop: Workshop, wanted: Sequence[GatePlan], rule: Rule) -> dict[str, Any]:
    """Verdicts on mislabelled candidates: how many would be released by the tests on their items, and how many are by
    these and the base's agreement with the labels. Raises RatchetError when one cannot be trained."""
    stock = trained(workshop, wanted, 0, 0, rule)
    rows = [_row(case, rule) for case in stock.cases]
    passed = [row for row in rows if row["outcome"] == "passed"]
    return {
        "released": sum(bool(row["agrees"]) for row in passed),
        "passed": len(passed),
        "gain_shown": sum(bool(row["gain_shown"]) for row in rows),
        "of": len(rows),
        "candidates": rows,
        "not_trained": dict(stock.not_trained),
        "seconds_of_candidates": stock.seconds,
    }


def _row(case: Case, rule: Rule) -> dict[str, Any]:
    (suite,) = (suite for suite in case.suites if suite.role == "gain")
    judged = judge(case.own(), rule)
    return {
        "name": case.name,
        "domain": suite.name,
        "outcome": judged.outcome,
        "gain_shown": judged.gained,
        "unproven": judged.unproven,
        "gained": case.gained,
        "beyond_margin": case.beyond(rule),
        "mean_lost": case.mean_lost,
        **agreed(suite, case, rule.loss_level),
    }


def agreed(suite: Suite, case: Case, level: float) -> dict[str, Any]:
    """Agreement of the base with the labels of a gain suite, on the items that the gate judges, by the gate's own test
    at ``level``."""
    hits = hits_of(suite, case.own().base[suite.name])
    chance = suite.k / min(suite.limit, len(case.base[suite.name]))  # nearly every caption is of one picture
    agrees = agreement(hits, chance, None, level).p_superior <= level
    return {"base": float(hits.mean()), "chance": chance, "agrees": agrees}
