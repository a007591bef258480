"""Scores of merged adapters on the tuning half of the gate's suites; the verdict then falls on the hidden half.

PAINT's measure: the mean of what must not be lost (retention suites) and of what is to be learned (gain suites).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from ops.ledger import UpdateRow
from ops.settings import Settings
from serving.engines.adapters import adapter_name
from streams.store import SampleStore
from updater.draw import HAVING
from updater.gate import Suite, fresh_suites, load_suites
from updater.gate.memory_suites import choose_memory, learned_before, memory_suites
from updater.gate.open import open_evaluator
from updater.gate.suite_items import Half
from updater.learner import Base
from updater.recipes import Family


def update_suites(settings: Settings, store: SampleStore, update: UpdateRow) -> tuple[list[Suite], list[Suite]]:
    """What an update is judged by: the suites of its family with those of what was learned before, and fresh ones.

    What lies before the update's data is what the updates that led to its incumbent have learned.

    Raises GateError when a suite cannot be read.
    """
    family: Family = "vlm" if update.family == "vlm" else "clip"
    fresh = store.scan(version=update.store_version, split="fresh_eval", after=update.data_from, having=HAVING[family])
    most = settings.gate.max_items
    suites = load_suites(settings.gate.suites, settings.home, family, most)
    suites += _memory_suites(settings, store, update, family, fresh)
    return suites, fresh_suites(fresh, family=family, min_items=settings.gate.min_items, limit=most)


def _memory_suites(
    settings: Settings, store: SampleStore, update: UpdateRow, family: Family, fresh: pa.Table
) -> list[Suite]:
    if not update.data_from:
        return []  # nothing was learned yet
    version, having, min_units = update.store_version, HAVING[family], 2 * settings.gate.min_items
    rows = store.scan(version=version, split="fresh_eval", columns=["id", "domain"], having=having)
    chosen = choose_memory(learned_before(rows, fresh), min_units)
    wanted = [each for ids in chosen.values() for each in ids]
    held = store.scan(version=version, split="fresh_eval", ids=wanted, having=having)
    return memory_suites(held, chosen, family, min_units)


def tuned_on(suites: Sequence[Suite], min_items: int) -> list[Suite]:
    """The suites that a search may look at: those of which both halves have items enough to say something.

    A suite that is too small to be divided stays whole for the gate.
    """
    few = max(min_items, 2)
    for suite in suites:
        suite.items()  # read once: both halves are made of it
    halves: tuple[Half, Half] = ("tuning", "hidden")
    return [suite for suite in suites if all(len(suite.half(half).items()) >= few for half in halves)]


class TuningScores:
    """Scores adapters of one update, through the engine that serves. See :class:`updater.linesearch.Scored`."""

    def __init__(self, settings: Settings, base: Base, suites: Sequence[Suite]) -> None:
        """``suites``: those of :func:`tuned_on`; without any there is no search, and the recipe's weight is taken."""
        self.settings = settings
        self.base = base
        self.suites = [suite.half("tuning") for suite in suites]

    @classmethod
    def of(cls, settings: Settings, store: SampleStore, base: Base, update: UpdateRow) -> TuningScores:
        """On what an update will be judged by. Raises GateError when a suite cannot be read."""
        suites, fresh = update_suites(settings, store, update)
        return cls(settings, base, tuned_on([*suites, *fresh], settings.gate.min_items))

    @property
    def passes(self) -> int:
        """Items asked of one adapter."""
        return sum(len(suite.items()) for suite in self.suites)

    def __call__(self, directory: Path) -> float:
        """The mean of both roles' means; of one role where there is no suite of the other. Between 0 and 1."""
        name = adapter_name(directory)
        marks: dict[str, list[float]] = {}
        with open_evaluator(self.settings, self.base) as evaluator:
            evaluator.load(name, directory)
            for suite in self.suites:
                score = evaluator.score(suite, name, label=f"{suite.name}, tuning half").hits.mean()
                marks.setdefault(suite.role, []).append(float(score))
        means = [sum(scores) / len(scores) for scores in marks.values()]
        return sum(means) / len(means) if means else 0.0
