"""The number of items that a suite needs: the chance that non-inferiority is shown when nothing has changed.

Items disagree between two models that are equally good, as often as for the good candidates, with a random sign. All
retention suites must pass, so each is tested at the whole level of the look.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.gate.cases import Case, Rule, hits_of
from benchmarks.gate.resample import swapped
from core.progress import track
from updater.gate.statistics import Comparison, compare_accuracy, compare_clusters
from updater.gate.suites import Suite, Task

SIZES = (100, 150, 250, 400, 600, 1000, 1600)
MARGINS = (0.03, 0.04, 0.05, 0.06, 0.08)
TASKS: tuple[Task, ...] = ("retrieval", "classification")


def power(cases: Sequence[Case], rule: Rule, count: int, seed: int) -> list[dict[str, Any]]:
    """Power by task, suite size and margin: ``count`` item sets for each size, from the good candidates in turn."""
    rows = []
    rng = np.random.default_rng(seed)
    for task in TASKS:
        sources = [(case, suite) for case in cases for suite in case.suites if _guards(suite, task)]
        if not sources:
            continue
        for size in track(SIZES, f"power, {task}"):
            lows = np.array([_low(sources[i % len(sources)], size, rule.loss_level, rng) for i in range(count)])
            rows += [
                {"task": task, "items": size, "margin": margin, "power": float((lows >= -margin).mean()),
                 "draws": count, "level": rule.loss_level}
                for margin in MARGINS
            ]  # fmt: skip
    return rows


def _guards(suite: Suite, task: Task) -> bool:
    return suite.role == "retention" and suite.task == task


def _low(source: tuple[Case, Suite], size: int, level: float, rng: np.random.Generator) -> float:
    """The lower bound of the difference on one draw; the test at ``level`` passes if it is above -margin."""
    case, suite = source
    before, after = (hits_of(suite, side[suite.name]) for side in (case.before, case.after))
    rows = rng.integers(len(before), size=size)
    first, second = swapped(before[rows], after[rows], rng)
    return _compare(suite, first, second, level).bounds(level)[0]


def _compare(suite: Suite, before: np.ndarray, after: np.ndarray, level: float) -> Comparison:
    if suite.task == "classification":
        return compare_accuracy(before[:, 0], after[:, 0], margin=0.05)
    return compare_clusters(before, after, margin=0.05, level=level)
