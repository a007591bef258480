"""Which source of samples a regression comes from.

For each source, the incumbent learns a few batches of which half are its samples alone, and half are reference and
replayed pairs as in the recipe. The suites that got worse then say what it does to them. Influence by gradients
(TracIn: Pruthi et al., NeurIPS 2020) is cheaper, and did not find sources whose wrong texts are alike to the right
ones: near the candidate, contradictory pairs flatten all similarities, which helps what has gone wrong
(docs/benchmarks/gate.md)."""

from __future__ import annotations

import random
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import TrainingError
from core.ledger import UpdateRow
from core.progress import progress_log, track
from serving.engines.clip_base import ClipBase
from streams.store.sample_store import SampleStore
from updater.adapters import WeightDelta, read_delta
from updater.data.pools import Example, Pair, Pools, StoredExamples
from updater.families import make_learner
from updater.gate.clip import ClipEvaluator
from updater.gate.suites import Suite
from updater.gate.verdict import Blame, Suspect
from updater.recipes import PARTS, Part, Recipe
from updater.step.learner import AnyLearner

STEPS: Final = 24
HALF: Final = 24
"""Pairs of the source in a batch, and of the others."""
WARMUP: Final = 3
MOST_PAIRS: Final = 144
"""Of each source, and of the reference and replay pools together."""
FEWEST: Final = 8
"""Samples of a source that is asked."""
MOST_SOURCES: Final = 12
MOST_ITEMS: Final = 2000
"""Of the suites that are asked; always one suite."""
STANDS_OUT: Final = 2.0
"""Standard errors, over paired items, between the losses of the source that is blamed and the next."""


def blame(
    base: ClipBase,
    recipe: Recipe,
    incumbent: Path | None,
    update: UpdateRow,
    store: SampleStore,
    pools: Pools,
    evaluator: ClipEvaluator,
    suites: Sequence[Suite],
) -> Blame | None:
    """Rank the sources of an update's new samples by their harm. ``incumbent``: its folder. ``suites``: those that got
    worse, the worst first. None if there are not two sources to tell apart."""
    by_source = _by_source(store, update, pools)
    if len(by_source) < 2 or not suites:
        return None
    asked = [suites[0]]
    for suite in suites[1:]:
        if sum(len(each.items()) for each in [*asked, suite]) <= MOST_ITEMS:
            asked.append(suite)
    before, after = (_hits(evaluator, asked, name) for name in (update.incumbent, update.adapter))
    start: WeightDelta = read_delta(incumbent, base) if incumbent else {}
    held: list[tuple[Example, Part]] = [
        (pair, part) for part in PARTS if part != "new" for pair in pools.of(part)[: MOST_PAIRS // 2]
    ]
    groups = [pairs[:MOST_PAIRS] for pairs in by_source.values()]
    examples = [*(pair for group in groups for pair in group), *(pair for pair, _ in held)]
    first, losses = 0, []
    learner = make_learner(base, recipe, start, update.seed)
    try:
        parts: list[Part] = ["new"] * (len(examples) - len(held))
        learner.prepare(examples, [*parts, *(part for _, part in held)])
        fresh = [parameter.detach().clone() for parameter in learner.parameters.values()]
        for group in track(groups, f"{update.id}: asking {len(groups)} sources", total=len(groups)):
            own = range(first, first := first + len(group))
            with torch.no_grad():
                for parameter, value in zip(learner.parameters.values(), fresh, strict=True):
                    parameter.copy_(value)
            learner.optimizer.state.clear()
            with _learned(learner, recipe, own, range(len(examples) - len(held), len(examples))) as folder:
                hits = _hits_of(evaluator, asked, folder) if folder else np.zeros_like(before)
            losses.append(before - hits)
    finally:
        learner.close()
    order = sorted(range(len(groups)), key=lambda number: -losses[number].mean())
    names = list(by_source)
    found = tuple(Suspect(names[i], len(by_source[names[i]]), float(losses[i].mean())) for i in order)
    apart = losses[order[0]] - losses[order[1]]
    error = float(apart.std() / np.sqrt(len(apart)))
    stands_out = found[0].harm > 0 and float(apart.mean()) > STANDS_OUT * error
    progress_log.info(f"{update.id}: learning from {found[0].source} alone does most harm, {found[0].harm:.1%}")
    return Blame(int((before > after).sum()), found, found[0].source if stands_out else None)


def _by_source(store: SampleStore, update: UpdateRow, pools: Pools) -> Mapping[str, list[Pair]]:
    """Pairs that the update visited, of the sources with most of them."""
    found: dict[str, list[Pair]] = defaultdict(list)
    if not isinstance(pools.new, StoredExamples):
        return found
    visited = pools.new.addresses[: int(update.cost.get("visited", len(pools.new)))]
    for number, row in enumerate(store.rows_at(visited.tolist(), ["source"], update.store_version)):
        example = pools.new[number]
        if row["source"] and isinstance(example, Pair):
            found[row["source"]].append(example)
    most = sorted(found, key=lambda name: (-len(found[name]), name))[:MOST_SOURCES]
    return {name: found[name] for name in most if len(found[name]) >= FEWEST}


@contextmanager
def _learned(learner: AnyLearner, recipe: Recipe, own: Sequence[int], others: Sequence[int]) -> Iterator[Path | None]:
    """Learn from batches of both kinds of rows; yields the adapter's folder, or None if the training diverged."""
    chance = random.Random(0)  # noqa: S311
    left: list[int] = []
    try:
        for step in range(STEPS):
            left = left if len(left) >= HALF else chance.sample(own, len(own))
            rows, left = left[:HALF] + chance.sample(others, min(HALF, len(others))), left[HALF:]
            learner.ready(rows)
            if len(rows := learner.usable(rows)) < 2:
                continue
            learner.forward_backward(rows)
            learner.optimizer_step(recipe.schedule.peak / 2 * min(1.0, (step + 1) / WARMUP), step, STEPS)
    except TrainingError:
        yield None
        return
    with tempfile.TemporaryDirectory() as work:
        staging = Path(work) / "adapter"
        yield staging.rename(Path(work) / learner.model.write(learner.model.delta(), staging))


def _hits_of(evaluator: ClipEvaluator, suites: Sequence[Suite], folder: Path) -> NDArray[np.float64]:
    evaluator.load(folder.name, folder)
    try:
        return _hits(evaluator, suites, folder.name)
    finally:
        evaluator.engine.unload(folder.name)


def _hits(evaluator: ClipEvaluator, suites: Sequence[Suite], adapter: str | None) -> NDArray[np.float64]:
    """Share of its views that each item of the suites is answered right in: [items]."""
    return np.concatenate([evaluator.score(suite, adapter).hits.mean(axis=1) for suite in suites])
