"""The gate on a simulated model: its own suites, its own decision, ranks instead of an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from benchmarks.gate.cases import Answers, item_scores_of
from benchmarks.lifetime.world import Model, World
from core.settings.updates import Gate
from updater.gate.decision import Findings, Scores, decide
from updater.gate.interim_analyses import InterimAnalysis
from updater.gate.sample_suites import (
    CAPACITY,
    choose_memory,
    fresh_suites,
    items_by_domain,
    memory_suites,
    store_suite,
)
from updater.gate.suite_items import Part, Seal, sample_item
from updater.gate.suites import Suite

Sample = tuple[str, int]
"""Domain and item of a held-out sample."""


class NoImages:
    """Images of simulated samples, which are never read."""

    def expect(self, ids: Sequence[str]) -> None:
        pass

    def __call__(self, sample: str) -> bytes:
        raise NotImplementedError("a simulated sample has no image")


@dataclass(frozen=True, slots=True)
class RankedSuite:
    """A suite, and the position of its items' ranks in a model."""

    suite: Suite
    rows: tuple[tuple[str, np.ndarray], ...]
    """By domain, in the suite's order of items."""

    def answers(self, model: Model, *, ranked: bool) -> Answers:
        """Ranks of the right answers [items, views], or hits if the gate sees no ranks."""
        ranks: Answers = np.concatenate([model[name][rows] for name, rows in self.rows])
        return ranks if ranked else (ranks < self.suite.k).astype(np.float64)


def static_suites(world: World, part: Part, seal: Seal) -> list[RankedSuite]:
    """A part of each static suite."""
    suites = []
    for domain in world.static:
        whole, names = domain.suite.model_copy(), [item_name((domain.name, i)) for i in range(domain.suite_items)]
        whole._items = tuple(sample_item({"id": name}, NoImages(), name) for name in names)
        suites.append(_ranked_suite(whole.part(part, seal)))
    return suites


def fresh_of(samples: Sequence[Sample], settings: Gate) -> list[RankedSuite]:
    table = _table(samples)
    suites = fresh_suites(table, min_items=settings.min_items, limit=settings.max_items, images=NoImages())
    return [_ranked_suite(suite) for suite in suites]


def memory_of(samples: Sequence[Sample], settings: Gate) -> list[RankedSuite]:
    table, fewest = _table(samples), 2 * settings.min_items
    suites = memory_suites(table, choose_memory(table, "clip", fewest), "clip", fewest, NoImages())
    return [_ranked_suite(suite) for suite in suites]


def samples_of(samples: Sequence[Sample], name: str) -> list[RankedSuite]:
    """One suite of all samples, or none of fewer than two."""
    items = [item for own in items_by_domain(_table(samples), "clip", NoImages()).values() for item in own]
    if len(items) < 2:
        return []
    return [_ranked_suite(store_suite(items, name, "retention", "clip", CAPACITY["clip"], "", NoImages()))]


def findings_of(
    suites: Sequence[RankedSuite],
    base: Model,
    incumbent: Model,
    candidate: Model,
    best: Mapping[str, tuple[str, Model]],
    look: InterimAnalysis,
    settings: Gate,
    *,
    ranked: bool = True,
) -> Findings:
    """The gate's findings from all suites at a look's levels.

    Args:
        best: name and model of the best release, by retention suite.
        ranked: whether the gate sees ranks; else only hits.
    """
    scores = []
    for each in suites:
        sides = [
            item_scores_of(each.suite, each.answers(model, ranked=ranked)) for model in (base, incumbent, candidate)
        ]
        before = sides[0] if incumbent is base else sides[1]
        name, released = best.get(each.suite.name, ("", None))
        rival = None if released is None else item_scores_of(each.suite, each.answers(released, ranked=ranked))
        scores.append(Scores(each.suite, sides[0], before, sides[2], best=rival, best_name=name))
    return decide(
        scores,
        level=look.level,
        loss_level=look.loss_level,
        margin=settings.margin,
        mean_margin=settings.mean_margin,
        min_items=settings.min_items,
    )


def item_name(sample: Sample) -> str:
    return "/".join(map(str, sample))


def _table(samples: Sequence[Sample]) -> pa.Table:
    ids = [item_name(sample) for sample in samples]
    return pa.table({"id": ids, "text": ids, "domain": [domain for domain, _ in samples]})


def _ranked_suite(suite: Suite) -> RankedSuite:
    places = [item.sample_id.rsplit("/", 1) for item in suite.items()]
    rows: list[tuple[str, np.ndarray]] = []
    start = 0
    for end in range(1, len(places) + 1):  # runs of one domain
        if end == len(places) or places[end][0] != places[start][0]:
            rows.append((places[start][0], np.array([int(item) for _, item in places[start:end]])))
            start = end
    return RankedSuite(suite, tuple(rows))
