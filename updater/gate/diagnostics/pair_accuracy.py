"""How many of its hard pairs a model tells apart: a pair counts only where both of its images are right (MMVP)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from updater.gate.diagnostics.diagnose import interval
from updater.gate.diagnostics.hard_pairs import HardPair, hard_pairs, pair_file, told_apart
from updater.gate.diagnostics.results import PairAccuracy, PairImage, ShownPair
from updater.gate.regressions import MOST_CHARS, thumbnail
from updater.gate.score import Scorer, load_arrays, store_arrays
from updater.gate.suite_items import Item
from updater.gate.suites import Suite

FEWEST: Final = 5
"""Pairs from which a share says anything."""
SHOWN: Final = 6


def pair_accuracy(scorer: Scorer, suite: Suite, incumbent: str | None, candidate: str) -> PairAccuracy | None:
    """Of a retrieval suite; None where it has few such pairs."""
    pairs = hard_pairs(scorer, suite)
    if len(pairs) < FEWEST:
        return None
    base, before, after = (right_pairs(scorer, suite, pairs, name) for name in (None, incumbent, candidate))
    wrong = sorted(np.flatnonzero(~after).tolist(), key=lambda place: (not before[place], place))
    first, second = before.astype(np.float64), after.astype(np.float64)
    return PairAccuracy(
        n=len(pairs),
        base=float(base.mean()),
        score=interval(first, second, None, zlib.crc32(f"pairs of {suite.name}".encode())),
        improved=int((after & ~before).sum()),
        worsened=int((before & ~after).sum()),
        shown=tuple(_shown(suite, pairs[place], bool(before[place])) for place in wrong[:SHOWN]),
    )


def right_pairs(scorer: Scorer, suite: Suite, pairs: Sequence[HardPair], adapter: str | None) -> NDArray[np.bool_]:
    """Whether one model tells each pair apart: bool [pairs]; kept beside the suite's scores."""
    path = pair_file(scorer, suite, adapter, "right pairs", [[pair.first, pair.second] for pair in pairs])
    known = load_arrays(path, ("right",)) if path else None
    if known is not None and known[0].shape == (len(pairs),):
        return known[0].astype(bool)
    items = suite.items()
    sides = [[items[pair.first] for pair in pairs], [items[pair.second] for pair in pairs]]
    label = f"{suite.name}, pairs"
    images = tuple(scorer.images(side, adapter, label) for side in sides)
    texts = tuple(scorer.texts([item.text for item in side], adapter, label) for side in sides)
    right = told_apart((images[0], images[1]), (texts[0], texts[1]))
    if path:
        store_arrays(path, right=right)
    return right


def _shown(suite: Suite, pair: HardPair, right_before: bool) -> ShownPair:
    first, second = (_image(suite.items()[place]) for place in (pair.first, pair.second))
    return ShownPair(first, second, pair.image_similarity, right_before)


def _image(item: Item) -> PairImage:
    if item.sample_id:
        return PairImage("", "", item.sample_id)
    return PairImage(item.text[:MOST_CHARS], thumbnail(item))
