"""How far an update moved the features of each tower, and whether they still spread.

One tower that moves without the other is what RESTORE calls feature shift (Yang et al., Towards Feature Shift for
Vision-Language Prompt Learning, 2024): image and text drift apart, and what the base could do goes. The distance
between both means is the modality gap (Liang et al., Mind the Gap, NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from updater.gate.checks import effective_rank
from updater.gate.diagnostics.results import FeatureShift, TowerShift
from updater.gate.score import Scorer, Vectors, prompt
from updater.gate.suite_items import spread
from updater.gate.suites import Suite

MOST_ITEMS: Final = 128
"""Over all retention suites. A model whose answers came from the cache computes as many images and texts, a second."""


def feature_shift(
    scorer: Scorer, suites: Sequence[Suite], incumbent: str | None, candidate: str
) -> FeatureShift | None:
    """On a few items of every retention suite, with the texts that it asks. None where there are fewer than two.

    Raises ValueError for features that are not finite.
    """
    retention = [suite for suite in suites if suite.role == "retention"]
    chosen = [
        (item, item.text if suite.task == "retrieval" else prompt(suite.templates[0], suite, item.text))
        for suite in retention
        for item in spread(suite.items(), max(2, MOST_ITEMS // len(retention)))
    ]
    items = list({item.source: item for item, _ in chosen}.values())
    texts = sorted({text for _, text in chosen})
    if min(len(items), len(texts)) < 2:
        return None
    images = [scorer.images(items, name, "feature shift") for name in (None, incumbent, candidate)]
    words = [scorer.texts(texts, name, "feature shift") for name in (None, incumbent, candidate)]
    if not all(np.isfinite(features).all() for features in (*images, *words)):
        raise ValueError("features are not finite")
    return FeatureShift(
        {"image": _shift(*images), "text": _shift(*words)}, modality_gap(images[1], words[1]),
        modality_gap(images[2], words[2]),
    )  # fmt: skip


def mean_shift(before: Vectors, after: Vectors) -> float:
    """Mean of 1 - cosine between the rows of two L2-normalised arrays [n, dim]: 0 where nothing moved."""
    return float(1.0 - np.einsum("ij,ij->i", before, after, dtype=np.float64).mean())


def modality_gap(images: Vectors, texts: Vectors) -> float:
    """Distance between the means of two sets of L2-normalised features, from 0 to 2."""
    return float(np.linalg.norm(images.mean(axis=0, dtype=np.float64) - texts.mean(axis=0, dtype=np.float64)))


def _shift(base: Vectors, before: Vectors, after: Vectors) -> TowerShift:
    ranks = effective_rank(before), effective_rank(after)
    return TowerShift(len(after), mean_shift(before, after), mean_shift(base, after), *ranks)
