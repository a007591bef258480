"""Redrawn item sets, and a truth that the gate never sees.

All items of each suite are repeatedly split: some for the gate, and the others decide what is true of the candidate.
Both are disjoint parts of one population, so the truth has a standard error of half a point to a point and a half. A
candidate that truly is inside its margin is sometimes taken for one beyond, and its release then counts as a false
accept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gate.cases import Case, Rule, judge
from benchmarks.gate.counting import share
from core.ledger.rows import GateOutcome

GAIN3 = 0.03
BESIDE = 0.02
"""A true loss is near the margin up to this distance."""
LOSSES = (-0.02, -0.015, -0.01, -0.005, 0.0, 0.005, 0.01, 0.015, 0.02)
GAINS = (0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 1.0)


@dataclass(frozen=True, slots=True)
class Redrawn:
    """One candidate under one split of the items."""

    name: str
    kind: str
    beyond: float
    worst: float
    """Most that a suite truly loses, as a share of its margin."""
    gained: float
    outcome: GateOutcome
    retained: bool


def redraw(cases: Sequence[Case], shown: Mapping[str, int], rule: Rule, times: int, seed: int) -> Iterator[Redrawn]:
    """``times`` splits of each case. ``shown``: items of each suite that the gate gets."""
    rng = np.random.default_rng(seed)
    for case in cases:
        for _ in range(times):
            seen, unseen = deal(case, shown, rng)
            judged = judge(case.rows(seen), rule)
            truth = case.rows(unseen)
            worst = max(truth.lost(s) / (s.margin or rule.margin) for s in case.suites if s.role == "retention")
            yield Redrawn(
                case.name, case.kind, truth.beyond(rule), worst, truth.gained, judged.outcome, judged.retained
            )


def deal(
    case: Case, shown: Mapping[str, int], rng: np.random.Generator
) -> tuple[dict[str, NDArray[np.int_]], dict[str, NDArray[np.int_]]]:
    orders = {suite.name: rng.permutation(len(case.after[suite.name])) for suite in case.suites}
    return (
        {name: order[: shown[name]] for name, order in orders.items()},
        {name: order[shown[name] :] for name, order in orders.items()},
    )


def figures_of(redrawn: Sequence[Redrawn]) -> dict[str, Any]:
    """Error rates over all splits; those of one candidate are not independent of each other.

    False accepts are of splits in which a suite truly lost up to BESIDE more than its margin, with a gain to be shown;
    false rejects of those with a gain of three points and no suite beyond half its margin.
    """
    harmful = [one for one in redrawn if 0.0 < one.beyond <= BESIDE]
    gaining = [one for one in harmful if one.gained > 0.0]
    fine = [one for one in redrawn if one.gained >= GAIN3 and one.worst <= 0.5]
    return {
        "false_accepts": _passed(gaining),
        "false_accepts_any_gain": _passed(harmful),
        "false_accepts_beyond": _passed([one for one in redrawn if one.beyond > BESIDE]),
        "false_rejects_gain3": _others(fine),
        "not_kept_gain3": share(sum(not one.retained for one in fine), len(fine)),
        "rejected_gain3": share(sum(one.outcome == "rejected" for one in fine), len(fine)),
        "candidates_at_margin": len({one.name for one in gaining}),
        "candidates_gain3": len({one.name for one in fine}),
        "by_loss": [
            {"from": low, "to": high, **_row([o for o in redrawn if low < o.beyond <= high and o.gained > 0.0])}
            for low, high in itertools.pairwise(LOSSES)
        ],
        "by_gain": [
            {"from": low, "to": high, **_row([o for o in redrawn if low < o.gained <= high and o.worst <= 0.5])}
            for low, high in itertools.pairwise(GAINS)
        ],
        "deals": len(redrawn),
    }


def _row(redrawn: Sequence[Redrawn]) -> dict[str, Any]:
    return {"passed": _passed(redrawn), "candidates": len({one.name for one in redrawn})}


def _passed(redrawn: Sequence[Redrawn]) -> dict[str, Any]:
    return share(sum(one.outcome == "passed" for one in redrawn), len(redrawn))


def _others(redrawn: Sequence[Redrawn]) -> dict[str, Any]:
    return share(sum(one.outcome != "passed" for one in redrawn), len(redrawn))
