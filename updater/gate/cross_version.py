"""Recall across versions: texts of a candidate among images that the incumbent embedded.

A release that changes the image tower needs every image of the catalog embedded anew, which takes hours for a million.
Where the candidate's texts find the incumbent's images as well as the incumbent's own texts do, searches need not wait
for that: they may begin with the vectors that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from updater.gate.score import Scorer, rank_of_best
from updater.gate.statistics import compare_accuracy
from updater.gate.suite_items import spread
from updater.gate.suites import Suite
from updater.gate.verdict import CrossVersion

MOST_ITEMS: Final = 600
"""Over all suites: images that the incumbent may have to embed once more, some seconds."""


def measure_cross_version(
    scorer: Scorer, suites: Sequence[Suite], incumbent: str | None, candidate: str, *, margin: float, level: float
) -> CrossVersion | None:
    """Ask the retrieval suites. None where there is nothing to measure: both have one image space, or no suite is of
    retrieval.

    Args:
        margin: loss of recall that must be excluded.
        level: of the one-sided test.
    """
    engine = scorer.engine
    retrieval = [suite for suite in suites if suite.task == "retrieval"]
    if not retrieval or engine.spaces(incumbent).image == engine.spaces(candidate).image:
        return None
    hits = [_hits(scorer, suite, incumbent, candidate, max(2, MOST_ITEMS // len(retrieval))) for suite in retrieval]
    old_old, new_old, new_new = (np.concatenate(column) for column in zip(*hits, strict=True))
    comparison = compare_accuracy(old_old, new_old, margin=margin)
    return CrossVersion(
        n=len(old_old), k=min(suite.k for suite in retrieval), old_old=comparison.before, new_old=comparison.after,
        new_new=float(new_new.mean()), ci_low=comparison.bounds(level)[0], margin=margin,
    )  # fmt: skip


def _hits(
    scorer: Scorer, suite: Suite, incumbent: str | None, candidate: str, most: int
) -> tuple[NDArray[np.float64], ...]:
    """Whether each text of a suite has a right image among its k nearest, by the versions of both."""
    items = spread(suite.items(), most)
    texts = sorted({item.text for item in items})
    right = np.array([[item.text == text for item in items] for text in texts])
    old_images = scorer.images(items, incumbent, f"{suite.name}, images of the incumbent")
    new_images = scorer.images(items, candidate, f"{suite.name}, images of the candidate")
    old_texts, new_texts = scorer.texts(texts, incumbent), scorer.texts(texts, candidate)
    pairs = ((old_texts, old_images), (new_texts, old_images), (new_texts, new_images))
    return tuple((rank_of_best(left @ images.T, right) < suite.k).astype(np.float64) for left, images in pairs)
