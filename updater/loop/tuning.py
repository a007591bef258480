"""Scores of merged adapters on the tuning half of the gate's suites; the verdict then falls on the hidden half.

PAINT's measure: the mean of what must not be lost (retention suites) and of what is to be learned (gain suites).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from core.ledger import UpdateRow
from core.settings import Settings
from serving.engines.adapters import adapter_name
from streams.store import SampleStore
from updater.data.draw import HAVING
from updater.gate import Suite, fresh_suites, load_suites
from updater.gate.evaluator_factory import open_evaluator
from updater.gate.held_out import TEXT_COLUMNS, HeldOut
from updater.gate.memory_suites import choose_memory, learned_before, memory_suites
from updater.recipes import Family
from updater.step.learner import Base


def update_suites(
    settings: Settings, store: SampleStore, update: UpdateRow, learned: Mapping[str, int] | None = None
) -> tuple[list[Suite], list[Suite]]:
    """What an update is judged by: the suites of its family with those of what was learned before, and fresh ones.

    Args:
        learned: where the data end that the updates which led to the incumbent have learned; by default where the
            update's own begin. Of one that learns them anew, held-out samples of them are in both kinds of suite.

    Raises GateError when a suite cannot be read.
    """
    learned = update.data_from if learned is None else learned
    family: Family = "vlm" if update.family == "vlm" else "clip"
    held_out = HeldOut(store, update.store_version, HAVING[family])
    fresh = held_out.rows(TEXT_COLUMNS, update.data_from)
    min_items, most = settings.gate.min_items, settings.gate.max_items
    suites = load_suites(settings.gate.suites, settings.home, family, most)
    if learned:  # else nothing was learned yet
        pending = fresh if learned == update.data_from else held_out.rows(["id"], learned)
        suites += _memory_suites(held_out, pending, family, 2 * min_items)
    return suites, fresh_suites(fresh, family=family, min_items=min_items, limit=most, images=held_out)


def _memory_suites(held_out: HeldOut, pending: pa.Table, family: Family, min_units: int) -> list[Suite]:
    chosen = choose_memory(learned_before(held_out.rows(["id", "domain"]), pending), family, min_units)
    wanted = [each for ids in chosen.values() for each in ids]
    return memory_suites(held_out.some(wanted, TEXT_COLUMNS), chosen, family, min_units, held_out)


def tuned_on(suites: Sequence[Suite], min_items: int) -> list[Suite]:
    """The suites that a search may look at: those of which both halves have items enough to say something."""
    return [suite for suite in suites if suite.divisible(min_items)]


class TuningScores:
    """Scores adapters of one update, through the engine that serves: an :class:`updater.training.linesearch.Scored`."""

    def __init__(self, settings: Settings, base: Base, suites: Sequence[Suite]) -> None:
        """``suites``: those of :func:`tuned_on`; without any there is no search, and the recipe's weight is taken."""
        self.settings = settings
        self.base = base
        self.suites = [suite.half("tuning") for suite in suites]

    @classmethod
    def of(
        cls,
        settings: Settings,
        store: SampleStore,
        base: Base,
        update: UpdateRow,
        learned: Mapping[str, int] | None = None,
    ) -> TuningScores:
        """On what an update will be judged by, see :func:`update_suites`. Raises GateError."""
        suites, fresh = update_suites(settings, store, update, learned)
        return cls(settings, base, tuned_on([*suites, *fresh], settings.gate.min_items))

    @property
    def passes(self) -> int:
        """Items asked of one adapter."""
        return sum(len(suite.items()) for suite in self.suites)

    def __call__(self, directory: Path) -> float:
        """The mean of both roles' means; of one role where there is no suite of the other. Between 0 and 1."""
        name = adapter_name(directory)
        by_role: dict[str, list[float]] = {}
        with open_evaluator(self.settings, self.base) as evaluator:
            evaluator.load(name, directory)
            for suite in self.suites:
                score = evaluator.score(suite, name, label=f"{suite.name}, tuning half").hits.mean()
                by_role.setdefault(suite.role, []).append(float(score))
        means = [sum(scores) / len(scores) for scores in by_role.values()]
        return sum(means) / len(means) if means else 0.0
