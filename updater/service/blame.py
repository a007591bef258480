"""Which source of samples a regression comes from.

To first order, a training step on a sample changes the loss of an item by minus the dot product of their gradients
(TracIn: Pruthi et al., Estimating Training Data Influence by Tracing Gradient Descent, NeurIPS 2020). So a source harms
the items that got worse as far as its mean gradient points against theirs, in the parameters of the adapter. TracIn
sums over an update's checkpoints; here they are on the straight line from incumbent to candidate, in its second half.
Before, the items that will be harmed do not pull yet; at its end alone, a source whose wrong texts could be learned
pulls no longer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from core.ledger import UpdateRow
from core.progress import progress_log
from serving.engines.clip_base import ClipBase
from streams.store.sample_store import SampleStore
from updater.adapters import WeightDelta, read_delta
from updater.adapters.weight_deltas import merge
from updater.data.pools import Pair, Pools, StoredExamples
from updater.families import make_learner
from updater.gate.run import Evaluator
from updater.gate.score import prompt
from updater.gate.suites import Suite
from updater.gate.verdict import Blame, Suspect
from updater.recipes import Recipe
from updater.step.learner import AnyLearner

BATCH: Final = 48
BATCHES: Final = 3
"""Of each source, and of the items."""
FEWEST: Final = 8
"""Samples of a source that is asked."""
MOST_SOURCES: Final = 64
POINTS: Final = (0.5, 0.75, 1.0)
"""Of the way from incumbent to candidate."""
STANDS_OUT: Final = 3.0
"""Times the harm of the second that the first source is blamed for."""


def blame(
    base: ClipBase,
    recipe: Recipe,
    incumbent: Path | None,
    candidate: Path,
    update: UpdateRow,
    store: SampleStore,
    pools: Pools,
    worse: Sequence[Pair],
) -> Blame | None:
    """Rank the sources of an update's new samples by their harm. ``incumbent``, ``candidate``: folders of adapters.
    ``worse``: what got worse, as pairs. None if there are not two sources to tell apart."""
    by_source = _by_source(store, update, pools)
    if len(by_source) < 2 or len(worse) < 2:
        return None
    progress_log.info(f"{update.id}: {len(worse)} items got worse; asking {len(by_source)} sources")
    groups = [list(worse)[: BATCH * BATCHES], *(pairs[: BATCH * BATCHES] for pairs in by_source.values())]
    examples = [pair for group in groups for pair in group]
    before: WeightDelta = read_delta(incumbent, base) if incumbent else {}
    after = read_delta(candidate, base)
    harm = [0.0] * len(by_source)
    for point in POINTS:
        learner = make_learner(base, recipe, merge(before, after, point), update.seed)
        try:
            learner.prepare(examples, ["new"] * len(examples))
            gradients, first = [], 0
            for group in groups:
                gradients.append(_mean_gradient(learner, range(first, first + len(group))))
                first += len(group)
        finally:
            learner.close()
        needed, *own = gradients
        harm = [total - float(each @ needed) / len(POINTS) for total, each in zip(harm, own, strict=True)]
    found = [Suspect(source, len(pairs), each) for (source, pairs), each in zip(by_source.items(), harm, strict=True)]
    found.sort(key=lambda each: (-each.harm, each.source))
    most, next_most = found[:2]
    stands_out = most.harm > 0 and most.harm >= STANDS_OUT * max(next_most.harm, 0.0)
    return Blame(len(worse), tuple(found), most.source if stands_out else None)


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


def _mean_gradient(learner: AnyLearner, rows: Sequence[int]) -> Tensor:
    """Mean gradient of batches of the rows, flat."""
    total, batches = torch.zeros(()), 0
    for start in range(0, len(rows), BATCH):
        some = list(rows[start : start + BATCH])
        learner.ready(some)
        if len(some := learner.usable(some)) < 2:
            continue
        learner.forward_backward(some, regularized=False)
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters.values()]
        total = total + torch.cat([each.flatten() for each in slopes])
        batches += 1
    return total / max(1, batches)


def worsened(evaluator: Evaluator[Any], suites: Sequence[Suite], incumbent: str | None, candidate: str) -> list[Pair]:
    """Items that the incumbent answers better than the candidate, as pairs to learn from."""
    pairs = []
    for suite in suites:
        before, after = (evaluator.score(suite, name).hits.mean(axis=1) for name in (incumbent, candidate))
        for number in (before > after).nonzero()[0]:
            item = suite.items()[int(number)]
            text = prompt(suite.templates[0], suite, item.text) if suite.task == "classification" else item.text
            pairs.append(Pair(item.id, text, item.read))
    return pairs
