"""Counts of verdicts, as shares with 95% intervals: exact ones of candidates, bootstrapped ones of item sets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.gate.cases import Case, Judged, Rule, Truth, judge
from benchmarks.gate.plans import DRIFT, family
from benchmarks.gate.resample import Drawn
from core.ledger.rows import GateOutcome

Share = dict[str, float | int | None]
RESAMPLES = 4000
NEAR = 0.02
"""Beyond its margin by no more, a suite is near it."""
TALLIED = ("passed", "rejected", "inconclusive", "gain_shown", "all_kept")


def share(count: int, of: int) -> Share:
    """``count`` of ``of`` with its 95% interval (Clopper and Pearson); None for ``of`` 0."""
    if of == 0:
        return {"count": 0, "of": 0, "rate": None, "low": None, "high": None}
    interval = stats.binomtest(count, of).proportion_ci(0.95, method="exact")
    return {"count": count, "of": of, "rate": count / of, "low": float(interval.low), "high": float(interval.high)}


def clustered(found: Iterable[tuple[str, bool]]) -> Share:
    """The share of item sets, each given as its candidate and whether it counts, with a 95% interval that resamples
    families of candidates (:func:`~benchmarks.gate.plans.family`): item sets of one are not independent (cluster
    bootstrap, percentiles: Davison and Hinkley, Bootstrap Methods, 1997, 3.8). Where all sets are alike resampling
    shows nothing: there the interval is the exact one of as many families. With few families it is too narrow.
    """
    by_family: dict[str, list[bool]] = defaultdict(list)
    for name, does in found:
        by_family[family(name)].append(does)
    counts, sizes = (np.array([each(own) for own in by_family.values()], dtype=int) for each in (sum, len))
    of, families = int(sizes.sum()), len(sizes)
    shared = share(int(counts.sum()), of)
    if of and 0 < counts.sum() < of:
        drawn = np.random.default_rng(0).multinomial(families, np.full(families, 1 / families), RESAMPLES)
        shared["low"], shared["high"] = map(float, np.quantile((drawn @ counts) / (drawn @ sizes), (0.025, 0.975)))
    elif of:
        exact = share(families if counts.sum() else 0, families)
        shared |= {"low": exact["low"], "high": exact["high"]}
    return {**shared, "families": families}


def others(counted: Share) -> Share:
    """The share of the rest."""

    def rest(value: float | None) -> float | None:
        return None if value is None else 1 - value

    turned = {"rate": rest(counted["rate"]), "low": rest(counted["high"]), "high": rest(counted["low"])}
    return {**counted, "count": int(counted["of"] or 0) - int(counted["count"] or 0), **turned}


@dataclass(frozen=True, slots=True)
class SuiteCount:
    """One candidate."""

    case: Case
    truth: Truth
    beyond: float
    """Most that a suite lost beyond its margin; ``excess``: that a suite or the mean did."""
    excess: float
    judged: Judged
    """By the suites' own draws."""


def rows(cases: Sequence[Case], drawn: Sequence[Case], rule: Rule) -> list[SuiteCount]:
    """Every case with its truth, and the verdict on ``drawn``, the same models on the suites' own items."""
    return [
        SuiteCount(case, case.truth(rule), case.beyond(rule), case.excess(rule), judge(sample, rule))
        for case, sample in zip(cases, drawn, strict=True)
    ]


def counted(rows: Iterable[SuiteCount]) -> dict[str, Any]:
    """Candidates by truth and by verdict, false accepts among the harmful and false rejects among the good.

    ``harmful_excess``: how far beyond a margin the harmful lie, since those far beyond are easily kept out.
    A good candidate that is not accepted counts as a false reject, whether rejected or undecided, and whether retention
    (``good_not_kept``) or an unproven gain is the reason.
    """
    candidates = list(rows)
    harmful = [row for row in candidates if row.truth == "harmful"]
    good = [row for row in candidates if row.truth == "good"]
    idle = [row for row in candidates if row.truth == "idle"]
    near = [row for row in harmful if row.excess <= NEAR]
    excess = [row.excess for row in harmful]
    return {
        "candidates": len(candidates),
        "harmful": len(harmful),
        "idle": len(idle),
        "good": len(good),
        **{outcome: _with(candidates, outcome) for outcome in ("passed", "rejected", "inconclusive")},
        "harmful_excess": dict(
            zip(("least", "median", "most"), map(float, np.quantile(excess, (0, 0.5, 1))), strict=True)
        )
        if excess
        else None,
        "harmful_by_mean_alone": sum(row.beyond <= 0 for row in harmful),
        "false_accepts": share(_with(harmful, "passed"), len(harmful)),
        "false_accepts_within_2_points": share(_with(near, "passed"), len(near)),
        "false_accepts_further": share(_with(harmful, "passed") - _with(near, "passed"), len(harmful) - len(near)),
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
                "by": row.judged.unproven,
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
    """Shares of drawn item sets: accepted, rejected, undecided, a gain shown, all suites and the mean kept."""
    sets = list(drawn)
    shares = {
        outcome: clustered((one.name, one.judged.outcome == outcome) for one in sets)
        for outcome in ("passed", "rejected", "inconclusive")
    }
    shares["gain_shown"] = clustered((one.name, one.judged.gained) for one in sets)
    shares["all_kept"] = clustered((one.name, one.judged.retained) for one in sets)
    return shares


def _with(rows: Sequence[SuiteCount], outcome: GateOutcome) -> int:
    return sum(row.judged.outcome == outcome for row in rows)
