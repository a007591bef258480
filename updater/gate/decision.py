"""From outcomes to decisions: results per suite, the mean loss, the pooled gain, and one outcome for the candidate.

Retention: non-inferiority per suite and reference (incumbent, base, best release so far), each test at the look's full
level for losses; a suite's p is the largest of them (intersection-union: Berger, Technometrics 24, 1982). Mean loss:
the same test over all retention suites together, with a smaller margin. Gain: one test over all gain suites. Both tests
over several suites are stratified by suite and weighted by units. A gain of retrieval is tested on 1/log2(2 + rank),
and counts only if a loss of the default margin is also excluded for the metric. Single suites only attribute the gain
(Holm over them). Rejection: one suite, or the mean, that is significantly worse, by Holm over them and Bonferroni over
the references. Anything neither shown to stay inside the margin nor to be worse is *inconclusive*. Reasons:
docs/gate.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from core.ledger.rows import GateOutcome
from updater.gate.interim_analyses import LEAST_LEVEL
from updater.gate.statistics import Comparison, compare_clusters, holm, pool, reciprocal_log_rank
from updater.gate.suites import Suite, Task
from updater.gate.verdict import (
    MEAN,
    Change,
    Check,
    Decision,
    MeanLoss,
    PooledGain,
    Regression,
    SourceAgreement,
    SuiteResult,
)

RANK_STATISTIC = "1/log2(2 + rank)"
INCUMBENT, BASE = "the incumbent", "the base"
MOST_REFERENCES = 3


class ItemScores(Protocol):
    @property
    def ids(self) -> NDArray[np.str_]:
        """Item ids [n], in the suite's order."""

    @property
    def hits(self) -> NDArray[np.float64]:
        """Score of each answer, in [0, 1]: [n, views]."""

    @property
    def ranks(self) -> NDArray[np.int32] | None:
        """0-based ranks of the right answers [n, views]; None for answers without ranks."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Answers of three models to one suite. `before` is the incumbent (the base if nothing was released)."""

    suite: Suite
    base: ItemScores
    before: ItemScores
    after: ItemScores
    chance: float = 0.0
    worst: tuple[Regression, ...] = ()
    clusters: NDArray[np.int_] | None = None
    """Items with the same number are not independent (:meth:`Suite.clusters`); None: all items are independent."""
    best: ItemScores | None = None
    """Of the best release so far, which is the same for all suites over folders; None if that is the incumbent, or
    there was none."""
    best_name: str = ""
    used: int = 0
    """Earlier judgements that the items were asked for."""


@dataclass(frozen=True, slots=True)
class Findings:
    results: tuple[SuiteResult, ...]
    gain: PooledGain | None
    mean: MeanLoss | None = None
    tested: bool = False
    """True if all tests that a pass needs were possible: retention suites, each with enough items, and a gain. Depends
    on the number of items, not on the answers."""
    trust: tuple[SourceAgreement, ...] = ()


def decide(
    scores: Sequence[Scores], *, level: float, loss_level: float, margin: float, mean_margin: float, min_items: int
) -> Findings:
    """Compute one result per suite, in the order given, the mean loss, and the pooled gain. ``level``: of the tests for
    a gain; at 0 nothing can be shown, and intervals use LEAST_LEVEL. ``loss_level``: of the tests that exclude a loss,
    and of those that show one. ``margin``: for suites that name none; ``mean_margin``: of the mean loss."""
    level, loss_level = max(level, LEAST_LEVEL), max(loss_level, LEAST_LEVEL)
    smallest = {"retention": loss_level, "gain": min(level, loss_level)}
    sides = [_Sides.of(s, margin, smallest[s.suite.role], MOST_REFERENCES * len(scores)) for s in scores]
    able = [i for i, side in enumerate(sides) if side.units >= min_items]
    retention = [(s, side) for s, side in zip(scores, sides, strict=True) if s.suite.role == "retention"]
    means = _means(retention, mean_margin)
    *of_suites, of_mean = holm([*(sides[i].p_worse(loss_level) for i in able), p_worse(means, loss_level)], loss_level)
    worse = dict(zip(able, of_suites, strict=True))
    gains = [i for i in able if scores[i].suite.role == "gain"]
    gained = dict(zip(gains, holm([sides[i].statistic.p_superior for i in gains], level), strict=True))
    results = []
    for i, (s, side) in enumerate(zip(scores, sides, strict=True)):
        is_worse = worse.get(i, (False, loss_level))[0]
        if s.suite.role == "retention":
            decided = _retention(s, side, is_worse, loss_level, min_items)
            results.append(_result(s, side, loss_level, loss_level, decided))
        else:
            shown, local = gained.get(i, (False, level))
            decided = _gain(s, side, is_worse, shown, local, loss_level, min_items)
            results.append(_result(s, side, local, loss_level, decided))
    strata = [(s.suite, side) for s, side in zip(scores, sides, strict=True) if s.suite.role == "gain"]
    gain = _pooled(strata, level, loss_level, margin, min_items) if strata else None
    held = [side.units >= min_items for _, side in retention]
    tested = bool(held) and all(held) and gain is not None and gain.units >= min_items
    mean = _mean_loss(means, len(retention), of_mean[0], loss_level, min_items) if means else None
    return Findings(tuple(results), gain, mean, tested)


def conclude(findings: Findings, checks: Sequence[Check]) -> tuple[GateOutcome, tuple[str, ...]]:
    results, gain = findings.results, findings.gain
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
    failed += [f"{r.name}: {r.reason}" for r in results if r.decision == "failed"]
    mean = findings.mean
    if mean is not None and mean.decision == "failed":
        failed.append(f"{MEAN}: {mean.reason}")
    if failed:
        return "rejected", tuple(failed)
    retention = [r for r in results if r.role == "retention"]
    unproven = [f"{r.name}: {r.reason}" for r in retention if r.decision == "inconclusive"]
    if not retention:
        unproven.append("no retention suite was asked: what the model could do before is not protected")
    if mean is not None and mean.decision != "passed":
        unproven.append(f"{MEAN}: {mean.reason}")
    if gain is None:
        unproven.append("there are no fresh samples to show a gain on")
    elif gain.decision != "passed":
        unproven.append(f"gain: {gain.reason}")
    if unproven or gain is None:
        return "inconclusive", tuple(unproven)
    if doubts := tuple(source.reason for source in findings.trust if source.reason):
        return "inconclusive", doubts
    return "passed", (
        f"gain: {gain.reason}",
        f"all {len(retention)} retention suites stay inside their margin, against every model that was compared",
        *([f"{MEAN}: {mean.reason}"] if mean else []),
    )


@dataclass(frozen=True, slots=True)
class _Sides:
    """The candidate compared with each reference, by the suite's metric; the gain is tested on `statistic`."""

    references: dict[str, Comparison]
    """By the reference's description; a model that is two references is compared once."""
    incumbent: Comparison
    base: Comparison
    statistic: Comparison
    best: Comparison | None = None

    @classmethod
    def of(cls, scores: Scores, margin: float, level: float, tests: int) -> _Sides:
        suite, after = scores.suite, scores.after
        own = suite.margin or margin if suite.role == "retention" else margin
        seed = zlib.crc32(suite.name.encode())
        paired = partial(compare_clusters, clusters=scores.clusters, margin=own, level=level, tests=tests, seed=seed)

        def compared(reference: ItemScores) -> Comparison:
            if reference.ids.tolist() != after.ids.tolist():
                raise ValueError(f"suite {suite.name}: the models answered different items")
            return paired(reference.hits, after.hits)

        incumbent = compared(scores.before)
        base = incumbent if scores.before is scores.base else compared(scores.base)
        references = {INCUMBENT: incumbent}
        if base is not incumbent and suite.role == "retention":
            references[BASE] = base
        best = None if scores.best is None else compared(scores.best)
        if best is not None:
            references[_best(scores.best_name)] = best
        statistic = incumbent
        before_ranks, after_ranks = scores.before.ranks, after.ranks
        ranked = suite.role == "gain" and suite.task == "retrieval"
        if ranked and before_ranks is not None and after_ranks is not None:
            statistic = paired(reciprocal_log_rank(before_ranks), reciprocal_log_rank(after_ranks), graded=True)
        return cls(references, incumbent, base, statistic, best)

    @property
    def units(self) -> int:
        return self.incumbent.units

    @property
    def worst(self) -> tuple[str, Comparison]:
        return max(self.references.items(), key=lambda entry: entry[1].p_noninferior)

    def p_worse(self, level: float) -> float:
        return p_worse(self.references, level)


def p_worse(references: Mapping[str, Comparison], level: float) -> float:
    """p of H0: no loss against any reference. 1 if the loss is shown to stay inside the margin."""
    open_ = [side.p_worse for side in references.values() if side.p_noninferior > level]
    return min(1.0, min(open_, default=1.0) * len(references))


def _result(
    scores: Scores, sides: _Sides, local: float, loss_level: float, decided: tuple[Decision, str]
) -> SuiteResult:
    suite, against = scores.suite, sides.incumbent
    low, high = against.bounds(local)
    base_low, base_high = sides.base.bounds(local)
    retention = suite.role == "retention"
    decision, reason = decided
    if retention and against.before - scores.chance <= against.margin:
        reason += "; weak guard: the incumbent is no further above chance than the margin"
    before, after = scores.before.hits, scores.after.hits
    metric = str(suite.metric)
    return SuiteResult(
        name=suite.name,
        role=suite.role,
        task=suite.task,
        metric=metric,
        description=suite.description,
        half=suite._half,
        n=against.n,
        units=against.units,
        base=float(scores.base.hits.mean()),
        before=against.before,
        after=against.after,
        difference=against.difference,
        ci_low=low,
        ci_high=high,
        difference_base=sides.base.difference,
        ci_base_low=base_low,
        ci_base_high=base_high,
        p=sides.worst[1].p_noninferior if retention else sides.statistic.p_superior,
        p_incumbent=against.p_noninferior if retention else against.p_superior,
        p_base=sides.base.p_noninferior if retention else sides.base.p_superior,
        alpha=local,
        margin=against.margin,
        decision=decision,
        reason=reason,
        method=against.method,
        needed=against.needed(local) if retention else 0,
        chance=scores.chance,
        by_view={view: (float(before[:, i].mean()), float(after[:, i].mean())) for i, view in enumerate(suite.views)},
        improved=int(np.sum(after > before)),
        worsened=int(np.sum(after < before)),
        worst=scores.worst,
        best=scores.best_name,
        best_release=None if sides.best is None else _change(metric, sides.best, loss_level, sides.best.p_noninferior),
        statistic=None
        if retention
        else _change(_statistic_name(suite, sides), sides.statistic, local, sides.statistic.p_superior),
        recall=None if retention else _change(metric, against, loss_level, against.p_noninferior),
        used=scores.used,
    )


def _retention(scores: Scores, sides: _Sides, is_worse: bool, level: float, min_items: int) -> tuple[Decision, str]:
    name, worst = sides.worst
    low = worst.bounds(level)[0]
    if worst.units < min_items:
        return "inconclusive", _too_few(scores.suite.task, worst, min_items)
    if worst.p_noninferior <= level:
        return "passed", f"at most {points(-low)} lost, {points(worst.margin)} allowed" if low < 0 else "nothing lost"
    if is_worse:
        lost = [entry for entry in sides.references.items() if entry[1].p_noninferior > level]
        reference, side = min(lost, key=lambda entry: entry[1].p_worse)
        return "failed", f"lost {points(-side.difference)} against {reference} ({moved(side)})"
    return "inconclusive", (
        f"a loss of {points(-low)} against {name} is not excluded, {points(worst.margin)} allowed; "
        f"about {max(worst.needed(level), worst.n + 1)} items would tell"
    )


def _gain(
    scores: Scores, sides: _Sides, is_worse: bool, shown: bool, local: float, loss_level: float, min_items: int
) -> tuple[Decision, str]:
    side, statistic = sides.incumbent, sides.statistic
    if side.units < min_items:
        return "inconclusive", _too_few(scores.suite.task, side, min_items)
    if is_worse:
        return "failed", f"lost {points(-side.difference)} on new data ({moved(side)})"
    metric = scores.suite.metric
    noninferior = side.p_noninferior <= loss_level
    loss = "" if noninferior else f"; a loss of {points(-side.bounds(loss_level)[0])} of {metric} is not excluded"
    if shown and noninferior:
        name = _statistic_name(scores.suite, sides)
        beside = "" if name == metric else f"; {metric} {moved(side)}"
        return "passed", f"gained {points(statistic.difference)} of {name} ({moved(statistic)}){beside}"
    if shown:
        return "inconclusive", f"better by {_statistic_name(scores.suite, sides)} ({moved(side)}){loss}"
    return "inconclusive", f"no gain shown ({moved(side)}, p = {statistic.p_superior:.2g} at level {local:.2g}){loss}"


def _means(retention: Sequence[tuple[Scores, _Sides]], margin: float) -> dict[str, Comparison]:
    """The mean difference to each reference. Suites without a folder ask for what was learned from the stream. Their
    gains would hide losses elsewhere from the base and an older release, so they count against the incumbent alone."""
    if not retention:
        return {}
    means = {INCUMBENT: pool([side.incumbent for _, side in retention], margin)}
    fixed = [(scores.best_name, side) for scores, side in retention if scores.suite.data]
    if base := [side.base for _, side in fixed if side.base is not side.incumbent]:
        means[BASE] = pool(base, margin)
    if best := [side.best for _, side in fixed if side.best is not None]:
        means[_best(fixed[0][0])] = pool(best, margin)
    return means


def _mean_loss(means: Mapping[str, Comparison], suites: int, is_worse: bool, level: float, min_items: int) -> MeanLoss:
    name, worst = max(means.items(), key=lambda entry: entry[1].p_noninferior)
    low, needed = worst.bounds(level)[0], worst.needed(level)
    decision: Decision = "inconclusive"
    if worst.units < min_items:
        reason = f"only {worst.units} independent items; at least {min_items} are asked for"
    elif worst.p_noninferior <= level:
        decision = "passed"
        kept = f"at most {points(-low)} lost on average" if low < 0 else "nothing lost on average"
        reason = f"{kept}, {points(worst.margin)} allowed"
    elif is_worse and (lost := [entry for entry in means.items() if entry[1].difference < -entry[1].margin]):
        decision = "failed"
        reference, side = min(lost, key=lambda entry: entry[1].p_worse)
        reason = f"lost {points(-side.difference)} on average against {reference} ({moved(side)})"
    else:
        reason = (
            f"a loss of {points(-low)} on average against {name} is not excluded, {points(worst.margin)} allowed; "
            f"about {max(needed, worst.n + 1)} items would tell"
        )
    return MeanLoss(
        decision=decision,
        reason=reason,
        n=worst.n,
        units=worst.units,
        suites=suites,
        references={name: _change(name, side, level, side.p_noninferior) for name, side in means.items()},
        margin=worst.margin,
        alpha=level,
        method=worst.method,
        needed=needed,
    )


def _best(name: str) -> str:
    return f"the best release {name}"


def _pooled(
    strata: Sequence[tuple[Suite, _Sides]], level: float, loss_level: float, margin: float, min_items: int
) -> PooledGain:
    statistic = pool([sides.statistic for _, sides in strata], margin)
    metric = pool([sides.incumbent for _, sides in strata], margin)
    names = [
        ", ".join(dict.fromkeys(name(suite, sides) for suite, sides in strata))
        for name in (_statistic_name, lambda suite, _: str(suite.metric))
    ]
    decision: Decision = "inconclusive"
    where = strata[0][0].name if len(strata) == 1 else f"{len(strata)} fresh domains"
    better = f"{names[0]} of {where} {moved(statistic)}"
    if metric.units < min_items:
        reason = f"only {metric.units} independent fresh items; at least {min_items} are asked for"
    elif statistic.p_superior > level:
        reason = f"no gain shown ({better}, p = {statistic.p_superior:.2g} at level {level:.2g})"
    elif metric.p_noninferior > loss_level:
        reason = f"{better}, but a loss of {points(-metric.bounds(loss_level)[0])} of {names[1]} is not excluded"
    else:
        decision = "passed"
        reason = f"gained {points(statistic.difference)}: {better}"
        reason += "" if names[0] == names[1] else f"; {names[1]} {moved(metric)}"
    return PooledGain(
        decision=decision,
        reason=reason,
        n=metric.n,
        units=metric.units,
        strata={suite.name: sides.units for suite, sides in strata},
        statistic=_change(names[0], statistic, level, statistic.p_superior),
        recall=_change(names[1], metric, loss_level, metric.p_noninferior),
        margin=margin,
        alpha=level,
        method=statistic.method,
        spread=statistic.unit_spread,
        recall_spread=metric.unit_spread,
    )


def _statistic_name(suite: Suite, sides: _Sides) -> str:
    return str(suite.metric) if sides.statistic is sides.incumbent else RANK_STATISTIC


def _change(name: str, side: Comparison, level: float, p: float) -> Change:
    return Change(name, side.before, side.after, side.difference, *side.bounds(level), p)


def moved(side: Comparison) -> str:
    return f"from {percent(side.before)} to {percent(side.after)}"


def _too_few(task: Task, side: Comparison, min_items: int) -> str:
    unit, item = ("images", "questions") if task == "vqa" else ("captions", "items")
    what = f"{side.n} items" if side.units == side.n else f"{side.units} {unit} ({side.n} {item})"
    return f"only {what}; at least {min_items} are asked for"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def points(share: float) -> str:
    return f"{100 * share:.1f} points"
