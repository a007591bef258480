"""All diagnostics of one gate run, from answers and features that it already has."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from core.errors import RatchetError
from updater.gate.answers import polarity
from updater.gate.decision import Scores
from updater.gate.diagnostics.concept_counts import ConceptCounts
from updater.gate.diagnostics.results import TAIL_BINS, YES_BOUND, Diagnostics, Interval, Tail, TailBin
from updater.gate.evaluator import Evaluator, M
from updater.gate.resampling import Floats, bootstrap
from updater.gate.suite_items import Item
from updater.gate.suites import Suite

EDGES: Final = (1, 10, 100)
"""Counts at which the second bin and those after it begin."""
LEVEL: Final = 0.05
"""Beyond each end of an interval."""
DRAWS: Final = 2_000
"""Of the bootstrap: 100 lie beyond each end."""


def diagnose(
    evaluator: Evaluator[M],
    scores: Sequence[Scores],
    incumbent: str | None,
    candidate: str,
    counts: ConceptCounts | None,
) -> Diagnostics:
    """What is told beside a decision. It decides nothing, so what cannot be computed becomes a warning.

    Args:
        scores: all suites; none where the candidate could not be scored.
        counts: of concepts in the training data; None: there are none, and results are not split by them.
    """
    if not scores:
        return Diagnostics()
    warnings = []
    diagnostics = Diagnostics()
    try:
        diagnostics = evaluator.diagnostics(scores, incumbent, candidate)
    except (RatchetError, RuntimeError, ValueError) as error:
        warnings.append(f"features and answers could not be compared: {error}")
    try:
        diagnostics = replace(diagnostics, tail=measure_tail(scores, counts) if counts else None)
    except RatchetError as error:
        warnings.append(f"results are not split by how often concepts were seen: {error.message}")
    return replace(diagnostics, warnings=(*_moved_away(diagnostics), *warnings))


def _moved_away(diagnostics: Diagnostics) -> list[str]:
    """Suites whose share of "yes" left the truth."""
    return [
        f'{name}: "yes" is {share.after:.0%} of the answers, before {share.before:.0%}; it is right for '
        f"{share.truth:.0%} (a warning from {YES_BOUND:.0%} further away)"
        for name, share in diagnostics.yes.items()
        if share.moved_away > YES_BOUND
    ]


def measure_tail(scores: Sequence[Scores], counts: ConceptCounts) -> Tail | None:
    """Split the results of suites by how often their concepts were seen in training, after Let It Wag (Udandarao et
    al., No "Zero-Shot" Without Exponential Data, NeurIPS 2024): what is rare in the data is what a mean hides. None
    where the store has no training sample. Raises StoreError.
    """
    concepts = [[concept_of(s.suite, item) for item in s.suite.items()] for s in scores]
    seen = counts(concept for each in concepts for concept in each)
    if not seen.rows:
        return None
    suites = {}
    for s, own in zip(scores, concepts, strict=True):
        places = np.searchsorted(EDGES, [seen[concept] for concept in own], side="right")
        suites[s.suite.name] = tuple(_bins(s, places))
    return Tail(seen.rows, seen.counted, suites)


def concept_of(suite: Suite, item: Item) -> str:
    """What an item shows, in words: its class; its concept, or its caption where the data name none; of a question
    without a concept its answer, or the question where that is yes or no."""
    if suite.task == "classification":
        return suite.names.get(item.text, item.text)
    if item.concept or suite.task == "retrieval":
        return item.concept or item.text
    answer = item.answers[0] if item.answers else ""
    return item.text if not answer or polarity(answer) else answer


def interval(before: Floats, after: Floats, clusters: NDArray[np.int_] | None, seed: int) -> Interval:
    """Both means over items and their difference, resampled by cluster; `before` and `after` are [n] or [n, views]."""
    first, second = (each.reshape(len(each), -1).mean(axis=1) for each in (before, after))
    index = np.arange(len(first)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sums = np.bincount(index, weights=second - first).astype(np.float64)
    boot = bootstrap(sums, np.bincount(index).astype(np.float64), seed=seed, draws=DRAWS)
    return Interval(float(first.mean()), float(second.mean()), boot.difference, boot.low(LEVEL), boot.high(LEVEL))


def _bins(scores: Scores, places: NDArray[np.int_]) -> Iterable[TailBin]:
    for place, name in enumerate(TAIL_BINS):
        where = places == place
        if where.any():
            clusters = None if scores.clusters is None else scores.clusters[where]
            seed = zlib.crc32(f"{scores.suite.name} {name}".encode())
            score = interval(scores.before.hits[where], scores.after.hits[where], clusters, seed)
            n = int(where.sum())
            yield TailBin(name, n, n if clusters is None else len(np.unique(clusters)), score)
