"""The gate's audit of a simulated release on sealed items, and what a model truly lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.gate.cases import item_scores_of
from benchmarks.lifetime.evaluation import RankedSuite
from benchmarks.lifetime.world import Model, World
from core.settings.updates import Gate
from updater.gate.statistics import pool
from updater.gate.verdict import MEAN
from updater.service.release_audit import compare_rows, lost


@dataclass(frozen=True, slots=True)
class Audited:
    passed: bool
    wrong: bool
    """It failed, and nothing that was asked has truly lost more than its margin."""


def audit(suites: Sequence[RankedSuite], world: World, last: Model | None, model: Model, settings: Gate) -> Audited:
    """Compare a model with the base and with the last one that passed. ``suites``: of sealed items."""
    references = [world.base, *([last] if last is not None else [])]
    failed = any(_lost(suites, world, reference, model, settings, len(references)) for reference in references)
    harmed = any(truly_lost(suites, world, reference, model, settings) for reference in references)
    return Audited(passed=not failed, wrong=failed and not harmed)


def truly_lost(suites: Sequence[RankedSuite], world: World, reference: Model, model: Model, settings: Gate) -> bool:
    """True if a suite, or the mean over them weighted by items, is truly worse by more than its margin."""
    changes = {each.suite.name: _change(each, world, reference, model) for each in suites}
    counted = _counted(suites, world, reference)
    items = [len(each.suite.items()) for each in counted]
    mean = float(np.average([changes[each.suite.name] for each in counted], weights=items))
    beyond = [-changes[each.suite.name] > (each.suite.margin or settings.margin) for each in suites]
    return any(beyond) or -mean > settings.mean_margin


def _lost(
    suites: Sequence[RankedSuite], world: World, reference: Model, model: Model, settings: Gate, references: int
) -> bool:
    results = {}
    for each in suites:
        before, after = (item_scores_of(each.suite, each.answers(side, ranked=True)) for side in (reference, model))
        rows = np.ones(len(each.suite.items()), dtype=bool)
        results[each.suite.name] = compare_rows(each.suite, before, after, rows, settings.margin, settings.alpha)
    counted = [results[each.suite.name] for each in _counted(suites, world, reference)]
    return bool(lost(results | {MEAN: pool(counted, settings.mean_margin)}, settings.alpha / references))


def _counted(suites: Sequence[RankedSuite], world: World, reference: Model) -> list[RankedSuite]:
    """Those that have a part in the mean: see the gate's mean loss."""
    return [each for each in suites if each.suite.data or reference is not world.base]


def _change(each: RankedSuite, world: World, reference: Model, model: Model) -> float:
    changes = [world.domains[name].score(model) - world.domains[name].score(reference) for name, _ in each.rows]
    return float(np.average(changes, weights=[len(rows) for _, rows in each.rows]))
