"""From outcomes to decisions: results per suite, and one outcome for the candidate.

Retention: per suite a non-inferiority test against the incumbent and one against the base; both must hold, so the
suite's p is the larger one (intersection-union: no correction inside a suite). Holm runs over the retention suites.
A suite *failed* if it is shown to be worse than before, at the level that Holm gave it, and not shown to stay inside
the margin; it is *inconclusive* if neither is shown. Neither is a pass. (Without the correction every further suite
would make it likelier that one which did not change looks worse.)

Gain: superiority over the incumbent; Holm over the gain suites. One must be shown; one that is shown to be worse and
not shown to stay inside the default margin rejects the candidate.

The two families are tested at this look's level each: a bad release needs a loss beyond the margin on some retention
suite (excluded at that level) or no gain at all (excluded at that level).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from updater.gate.statistics import Comparison, compare_accuracy, compare_clusters, holm
from updater.gate.suites import Suite, Task
from updater.gate.verdict import Check, Decision, Outcome, SuiteResult, Worse


class Marks(Protocol):
    """What one model got for its answers to a suite, whatever family it is of."""

    @property
    def ids(self) -> NDArray[np.str_]:
        """Item ids [n], in the suite's order."""

    @property
    def hits(self) -> NDArray[np.float64]:
        """How right each answer is, in [0, 1]: [n, views]."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Three models' answers to one suite. `before` is the incumbent (the base itself, where nothing was released)."""

    suite: Suite
    base: Marks
    before: Marks
    after: Marks
    chance: float = 0.0
    """What guessing would score."""
    worst: tuple[Worse, ...] = ()
    clusters: NDArray[np.int_] | None = None
    """Items with the same number are not independent (:meth:`Suite.clusters`); None: every item counts by itself."""


def decide(scores: Sequence[Scores], *, level: float, margin: float, min_items: int) -> list[SuiteResult]:
    """One result per suite, in the order given. `margin` is for suites that name none."""
    results: dict[int, SuiteResult] = {}
    for role in ("retention", "gain"):
        family = [(i, _Pair.of(s, margin, level / len(scores))) for i, s in enumerate(scores) if s.suite.role == role]
        able = [(i, pair) for i, pair in family if pair.incumbent.units >= min_items]
        refused, levels = holm([pair.p(role) for _, pair in able], level)
        tested = {i: (shown, local) for (i, _), shown, local in zip(able, refused, levels, strict=True)}
        for i, pair in family:
            shown, local = tested.get(i, (False, level / max(len(family), 1)))
            results[i] = _result(scores[i], pair, shown, local, min_items)
    return [results[i] for i in range(len(scores))]


def conclude(results: Sequence[SuiteResult], checks: Sequence[Check]) -> tuple[Outcome, tuple[str, ...]]:
    """The outcome and its reasons, the gravest first."""
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
    failed += [f"{r.name}: {r.reason}" for r in results if r.decision == "failed"]
    if failed:
        return "rejected", tuple(failed)
    retention = [r for r in results if r.role == "retention"]
    gains = [r for r in results if r.role == "gain"]
    unproven = [f"{r.name}: {r.reason}" for r in retention if r.decision == "inconclusive"]
    if not retention:
        unproven.append("no retention suite was asked: what the model could do before is not protected")
    if not any(r.decision == "passed" for r in gains):
        shown = [f"{r.name}: {r.reason}" for r in gains]
        unproven += shown or ["there are no fresh samples to show a gain on"]
    if unproven:
        return "inconclusive", tuple(unproven)
    best = max((r for r in gains if r.decision == "passed"), key=lambda r: r.difference)
    return "passed", (
        f"{best.name}: {best.reason}",
        f"all {len(retention)} retention suites stay inside their margin, against the incumbent and the base",
    )


@dataclass(frozen=True, slots=True)
class _Pair:
    incumbent: Comparison
    base: Comparison

    @classmethod
    def of(cls, scores: Scores, margin: float, level: float) -> _Pair:
        own = scores.suite.margin or margin if scores.suite.role == "retention" else margin
        first = _compare(scores, scores.before, own, level)
        same = scores.before is scores.base
        return cls(first, first if same else _compare(scores, scores.base, own, level))

    def p(self, role: str) -> float:
        if role == "gain":
            return self.incumbent.p_superior
        return max(self.incumbent.p_noninferior, self.base.p_noninferior)


def _compare(scores: Scores, reference: Marks, margin: float, level: float) -> Comparison:
    if reference.ids.tolist() != scores.after.ids.tolist():
        raise ValueError(f"suite {scores.suite.name}: the models answered different items")
    if scores.suite.task == "classification":
        return compare_accuracy(reference.hits[:, 0], scores.after.hits[:, 0], margin=margin)
    seed = zlib.crc32(scores.suite.name.encode())
    return compare_clusters(reference.hits, scores.after.hits, scores.clusters, margin=margin, level=level, seed=seed)


def _result(scores: Scores, pair: _Pair, shown: bool, local: float, min_items: int) -> SuiteResult:
    suite, against = scores.suite, pair.incumbent
    low, high = against.bounds(local)
    base_low, base_high = pair.base.bounds(local)
    retention = suite.role == "retention"
    decision, reason = (_retention if retention else _gain)(suite.task, pair, shown, local, min_items)
    if retention and against.before - scores.chance <= against.margin:
        reason += "; weak guard: the incumbent is no further above chance than the margin"
    before, after = scores.before.hits, scores.after.hits
    return SuiteResult(
        name=suite.name,
        role=suite.role,
        task=suite.task,
        metric=str(suite.metric),
        description=suite.description,
        half=suite._half,
        n=against.n,
        base=float(scores.base.hits.mean()),
        before=against.before,
        after=against.after,
        difference=against.difference,
        ci_low=low,
        ci_high=high,
        difference_base=pair.base.difference,
        ci_base_low=base_low,
        ci_base_high=base_high,
        p=pair.p(suite.role),
        p_incumbent=against.p_noninferior if retention else against.p_superior,
        p_base=pair.base.p_noninferior if retention else pair.base.p_superior,
        alpha=local,
        margin=against.margin if retention else 0.0,
        decision=decision,
        reason=reason,
        method=against.method,
        needed=against.needed(local) if retention else 0,
        chance=scores.chance,
        by_view={view: (float(before[:, i].mean()), float(after[:, i].mean())) for i, view in enumerate(suite.views)},
        improved=int(np.sum(after > before)),
        worsened=int(np.sum(after < before)),
        worst=scores.worst,
    )


def _retention(task: Task, pair: _Pair, shown: bool, local: float, min_items: int) -> tuple[Decision, str]:
    names = (("the incumbent", pair.incumbent), ("the base", pair.base))
    name, worst = max(names, key=lambda entry: entry[1].p_noninferior)
    low = worst.bounds(local)[0]
    if worst.units < min_items:
        return "inconclusive", _too_few(task, worst, min_items)
    if shown:
        return "passed", f"at most {points(-low)} lost, {points(worst.margin)} allowed" if low < 0 else "nothing lost"
    for reference, side in names:
        if side.p_worse <= local:
            change = f"from {percent(side.before)} to {percent(side.after)}"
            return "failed", f"lost {points(-side.difference)} against {reference} ({change})"
    return "inconclusive", (
        f"a loss of {points(-low)} against {name} is not excluded, {points(worst.margin)} allowed; "
        f"about {max(worst.needed(local), worst.n + 1)} items would tell"
    )


def _gain(task: Task, pair: _Pair, shown: bool, local: float, min_items: int) -> tuple[Decision, str]:
    side = pair.incumbent
    change = f"from {percent(side.before)} to {percent(side.after)}"
    if side.units < min_items:
        return "inconclusive", _too_few(task, side, min_items)
    if shown:
        return "passed", f"gained {points(side.difference)} ({change})"
    if side.p_worse <= local < side.p_noninferior:
        return "failed", f"lost {points(-side.difference)} on new data ({change})"
    return "inconclusive", f"no gain shown ({change}, p = {side.p_superior:.2g} at level {local:.2g})"


def _too_few(task: Task, side: Comparison, min_items: int) -> str:
    unit, item = ("images", "questions") if task == "vqa" else ("captions", "items")
    what = f"{side.n} items" if side.units == side.n else f"{side.units} {unit} ({side.n} {item})"
    return f"only {what}; at least {min_items} are asked for"


def percent(share: float) -> str:
    """`0.257` -> `25.7%`."""
    return f"{100 * share:.1f}%"


def points(share: float) -> str:
    """`0.05` -> `5.0 points`."""
    return f"{100 * share:.1f} points"
