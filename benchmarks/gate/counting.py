"""Counts of verdicts, as shares with exact intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from benchmarks.gate.cases import Case, Judged, Rule, Truth, judge
from benchmarks.gate.plans import DRIFT
from benchmarks.gate.resample import Drawn
from core.ledger.rows import GateOutcome

Share = dict[str, float | int | None]
TALLIED = ("passed", "rejected", "inconclusive", "gain_shown", "all_kept")


def share(count: int, of: int) -> Share:
    """``count`` of ``of`` with its 95% interval (Clopper and Pearson); None for ``of`` 0."""
    if of == 0:
        return {"count": 0, "of": 0, "rate": None, "low": None, "high": None}
    interval = stats.binomtest(count, of).proportion_ci(0.95, method="exact")
    return {"count": count, "of": of, "rate": count / of, "low": float(interval.low), "high": float(interval.high)}


def others(counted: Share) -> Share:
    return share(int(counted["of"] or 0) - int(counted["count"] or 0), int(counted["of"] or 0))


@dataclass(frozen=True, slots=True)
class SuiteCount:
    """One candidate."""

    case: Case
    truth: Truth
    beyond: float
    judged: Judged
    """By the suites' own draws."""


def rows(cases: Sequence[Case], drawn: Sequence[Case], rule: Rule) -> list[SuiteCount]:
    """Every case with its truth, and the verdict on ``drawn``, the same models on the suites' own items."""
    return [
        SuiteCount(case, case.truth(rule), case.beyond(rule), judge(sample, rule))
        for case, sample in zip(cases, drawn, strict=True)
    ]


def counted(rows: Iterable[SuiteCount]) -> dict[str, Any]:
    """Candidates by truth and by verdict, false accepts among the harmful and false rejects among the good.

    A good candidate that is not accepted counts as a false reject, whether rejected or undecided, and whether retention
    (``good_not_kept``) or an unproven gain is the reason.
    """
    candidates = list(rows)
    harmful = [row for row in candidates if row.truth == "harmful"]
    good = [row for row in candidates if row.truth == "good"]
    idle = [row for row in candidates if row.truth == "idle"]
    return {
        "candidates": len(candidates),
        "harmful": len(harmful),
        "idle": len(idle),
        "good": len(good),
        **{outcome: _with(candidates, outcome) for outcome in ("passed", "rejected", "inconclusive")},
        "false_accepts": share(_with(harmful, "passed"), len(harmful)),
        "false_rejects": share(len(good) - _with(good, "passed"), len(good)),
        "good_rejected": share(_with(good, "rejected"), len(good)),
        "good_not_kept": share(sum(not row.judged.retained for row in good), len(good)),
        "idle_accepted": share(_with(idle, "passed"), len(idle)),
    }


def by_kind(rows: Sequence[SuiteCount]) -> dict[str, dict[str, Any]]:
    kinds = dict.fromkeys(row.case.kind for row in rows)
    return {kind: counted(row for row in rows if row.case.kind == kind) for kind in kinds}


def drift(rows: Sequence[SuiteCount], rule: Rule, drawn: Mapping[str, Case]) -> dict[str, Any]:
    """The slow drift, update by update, with and without the comparison with the base.

    It is *caught* at the first update that retention rejects, and before harm if no harmful one is accepted.
    ``caught_by_base_at``: the first that the comparison with the incumbent alone would have accepted.
    """
    steps: list[dict[str, Any]] = []
    for number, row in enumerate([row for row in rows if row.case.kind == DRIFT], 1):
        blind = judge(drawn[row.case.name].without_base(), rule)
        alone = row.case.without_base()
        steps.append(
            {
                "update": number,
                "truth": row.truth,
                "beyond_base_margin": row.beyond,
                "within_margin_of_incumbent": alone.beyond(rule) <= 0,
                "outcome": row.judged.outcome,
                "outcome_without_base": blind.outcome,
                "kept": row.judged.retained,
                "kept_without_base": blind.retained,
                "gained": row.judged.gained,
                "by": [r.name for r in row.judged.results if r.role == "retention" and r.decision != "passed"],
            }
        )
    caught = [step["update"] for step in steps if not step["kept"]]
    by_base = [step["update"] for step in steps if step["kept_without_base"] and not step["kept"]]
    harmful = [step["update"] for step in steps if step["truth"] == "harmful"]
    return {
        "steps": steps,
        "caught_at": caught[0] if caught else None,
        "caught_by_base_at": by_base[0] if by_base else None,
        "caught_before_harm": bool(caught) and not any(step["kept"] for step in steps if step["truth"] == "harmful"),
        "harmful_from": harmful[0] if harmful else None,
        "let_in_without_base": sum(step["kept_without_base"] for step in steps),
    }


def tally(drawn: Iterable[Drawn]) -> dict[str, Share]:
    """Shares of drawn item sets: accepted, rejected, undecided, a gain shown, all retention suites passed."""
    verdicts = [one.judged for one in drawn]
    counts = (
        _outcomes(verdicts, "passed"),
        _outcomes(verdicts, "rejected"),
        _outcomes(verdicts, "inconclusive"),
        sum(one.gained for one in verdicts),
        sum(one.retained for one in verdicts),
    )
    return {name: share(count, len(verdicts)) for name, count in zip(TALLIED, counts, strict=True)}


def _with(rows: Sequence[SuiteCount], outcome: GateOutcome) -> int:
    return _outcomes([row.judged for row in rows], outcome)


def _outcomes(verdicts: Sequence[Judged], outcome: GateOutcome) -> int:
    return sum(one.outcome == outcome for one in verdicts)
