"""Redrawn item sets, and a truth that the gate never sees.

All items of each suite are repeatedly split: some for the gate, as many as candidates are judged on in service, and the
others decide what is true of the candidate.
Both are disjoint parts of one population, so the truth has a standard error of half a point to a point and a half. A
candidate that truly is inside its margin is sometimes taken for one beyond, and its release then counts as a false
accept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gate.cases import FEW, Case, Rule, judge
from benchmarks.gate.counting import Share, clustered
from benchmarks.processes import in_processes
from core.ledger.rows import GateOutcome

GAIN3 = 0.03
BESIDE = 0.02
"""A true loss is near the margin up to this distance."""
LOSSES = (-0.02, -0.015, -0.01, -0.005, 0.0, 0.005, 0.01, 0.015, 0.02)
MEANS = (-1.0, 0.0, 0.005, 0.01, 0.0125, 0.015, 0.0175, 0.02, 0.03, 1.0)
GAINS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 1.0)


@dataclass(frozen=True, slots=True)
class Redrawn:
    """One candidate under one split of the items."""

    name: str
    kind: str
    beyond: float
    worst: float
    """Most that a suite truly loses, as a share of its margin."""
    mean: float
    """True mean loss over the retention suites."""
    gained: float
    outcome: GateOutcome
    retained: bool


def redraw(cases: Sequence[Case], shown: Mapping[str, int], rule: Rule, times: int, seed: int) -> Iterator[Redrawn]:
    """``times`` splits of each case. ``shown``: items of each suite that the gate gets."""
    judged = [replace(case, judged={suite.name: shown[suite.name] for suite in case.suites}) for case in cases]
    tasks = [(case, [seed, number]) for number, case in enumerate(judged)]
    return itertools.chain.from_iterable(in_processes(partial(_splits, rule, times), tasks, few=FEW))


def _splits(rule: Rule, times: int, task: tuple[Case, list[int]]) -> list[Redrawn]:
    case, seed = task
    rng = np.random.default_rng(seed)
    return [_split(case, rule, rng) for _ in range(times)]


def _split(case: Case, rule: Rule, rng: np.random.Generator) -> Redrawn:
    seen, unseen = deal(case, rng)
    judged, truth = judge(case.rows(seen), rule), case.rows(unseen)
    worst = max(truth.lost(s) / (s.margin or rule.margin) for s in case.suites if s.role == "retention")
    return Redrawn(
        case.name, case.kind, truth.beyond(rule), worst, truth.mean_lost, truth.gained, judged.outcome, judged.retained
    )


def deal(case: Case, rng: np.random.Generator) -> tuple[dict[str, NDArray[np.int_]], dict[str, NDArray[np.int_]]]:
    """Numbers of those items that the gate judges, and of the others, by suite."""
    orders = {suite.name: rng.permutation(len(case.after[suite.name])) for suite in case.suites}
    return (
        {name: order[: case.judged[name]] for name, order in orders.items()},
        {name: order[case.judged[name] :] for name, order in orders.items()},
    )


def figures_of(redrawn: Sequence[Redrawn], mean_margin: float) -> dict[str, Any]:
    """Error rates over all splits, with intervals over candidates.

    False accepts are of splits in which a suite truly lost up to BESIDE more than its margin, with a gain to be shown;
    false rejects of those with a gain of three points and nothing beyond half its margin, neither a suite nor the mean.
    ``false_rejects_gain3_any_mean`` asks this of the suites alone. The mean loss is *stopped* where it truly is beyond
    its margin, there is a gain to be shown, and the candidate does not pass.
    """
    harmful = [one for one in redrawn if 0.0 < one.beyond <= BESIDE]
    gaining = [one for one in harmful if one.gained > 0.0]
    kept = [one for one in redrawn if one.worst <= 0.5 and one.mean <= 0.5 * mean_margin]
    fine = [one for one in kept if one.gained >= GAIN3]
    lossy = [one for one in redrawn if one.mean > mean_margin and one.gained > 0.0]
    return {
        "false_accepts": _share(gaining, _passed),
        "false_accepts_any_gain": _share(harmful, _passed),
        "false_accepts_beyond": _share([one for one in redrawn if one.beyond > BESIDE], _passed),
        "false_rejects_gain3": _share(fine, _stopped),
        "false_rejects_gain3_any_mean": _share(
            [one for one in redrawn if one.gained >= GAIN3 and one.worst <= 0.5], _stopped
        ),
        "not_kept_gain3": _share(fine, lambda one: not one.retained),
        "rejected_gain3": _share(fine, lambda one: one.outcome == "rejected"),
        "mean_loss_stopped": _share(lossy, _stopped),
        "mean_loss_stopped_suites_inside": _share([one for one in lossy if one.beyond <= 0.0], _stopped),
        "candidates_at_margin": len({one.name for one in gaining}),
        "candidates_gain3": len({one.name for one in fine}),
        "by_loss": _bins(LOSSES, [one for one in redrawn if one.gained > 0.0], lambda one: one.beyond),
        "by_mean": _bins(MEANS, [one for one in redrawn if one.gained > 0.0], lambda one: one.mean),
        "by_gain": _bins(GAINS, kept, lambda one: one.gained),
        "deals": len(redrawn),
    }


def _bins(
    edges: Sequence[float], redrawn: Sequence[Redrawn], value: Callable[[Redrawn], float]
) -> list[dict[str, Any]]:
    rows = []
    for low, high in itertools.pairwise(edges):
        own = [one for one in redrawn if low < value(one) <= high]
        rows.append({"from": low, "to": high, "passed": _share(own, _passed), "candidates": len({o.name for o in own})})
    return rows


def _share(redrawn: Sequence[Redrawn], counts: Callable[[Redrawn], bool]) -> Share:
    return clustered((one.name, counts(one)) for one in redrawn)


def _passed(one: Redrawn) -> bool:
    return one.outcome == "passed"


def _stopped(one: Redrawn) -> bool:
    return one.outcome != "passed"
