"""Measures whether texts of a candidate find images that the incumbent embedded: as they are, or over a bridge.

A bridge is the orthogonal map between the two image spaces (orthogonal Procrustes: Schönemann, 1966; Drift-Adapter:
Vejendla, EMNLP 2025, which also tries others). It is fitted on one half of the held-out images and judged on the other
half: published figures of 95 to 99% of the recall were 24 to 92% elsewhere, so none is offered unmeasured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes

from core.artifacts import Artifacts
from core.digests import digest_bytes
from serving.engines.bridge import bridge_key, dump_bridge
from updater.gate.crossings import Bridge, CrossVersion
from updater.gate.score import Scorer, Vectors, rank_of_best
from updater.gate.statistics import compare_accuracy
from updater.gate.suite_items import Item, spread
from updater.gate.suites import Suite
from updater.gate.verdict import Verdict

ALL: Final = slice(None)
MOST_ITEMS: Final = 600
"""Over all suites: the incumbent may have to embed these images again, some seconds."""


class _Asked:
    """Items of one suite, with the texts and images of both models."""

    def __init__(self, scorer: Scorer, suite: Suite, incumbent: str | None, candidate: str, most: int) -> None:
        self.k, self.items = suite.k, spread(suite.items(), most)
        texts = sorted({item.text for item in self.items})
        self.right = np.array([[item.text == text for item in self.items] for text in texts])
        self.old_images = scorer.images(self.items, incumbent, f"{suite.name}, images of the incumbent")
        self.new_images = scorer.images(self.items, candidate, f"{suite.name}, images of the candidate")
        self.old_texts, self.new_texts = scorer.texts(texts, incumbent), scorer.texts(texts, candidate)
        self.fitted = np.array([_is_fitted(item) for item in self.items])

    def hits(self, texts: Vectors, images: Vectors, among: NDArray[np.bool_] | slice = ALL) -> NDArray[np.float64]:
        """1 for each text with a right image among its k nearest. ``among``: only these images, and texts of them."""
        right = self.right[:, among]
        asked = right.any(axis=1)
        ranks = rank_of_best(texts[asked] @ images[among].T, right[asked])
        return (ranks < self.k).astype(np.float64)


def measure(
    scorer: Scorer, suites: Sequence[Suite], incumbent: str | None, candidate: str, margin: float, level: float
) -> CrossVersion | None:
    """Recall of a candidate's texts among images that the incumbent embedded: without a loss, searches need not wait
    for the catalog to be embedded again. None if both have one image space, or there is no retrieval suite. ``margin``:
    loss of recall that must be excluded. ``level``: of each one-sided test."""
    retrieval = [suite for suite in suites if suite.task == "retrieval"]
    if not retrieval or scorer.engine.spaces(incumbent).image == scorer.engine.spaces(candidate).image:
        return None
    most = max(2, MOST_ITEMS // len(retrieval))
    asked = [_Asked(scorer, suite, incumbent, candidate, most) for suite in retrieval]
    old_old = np.concatenate([each.hits(each.old_texts, each.old_images) for each in asked])
    new_old = np.concatenate([each.hits(each.new_texts, each.old_images) for each in asked])
    new_new = np.concatenate([each.hits(each.new_texts, each.new_images) for each in asked])
    comparison = compare_accuracy(old_old, new_old, margin=margin)
    return CrossVersion(
        n=len(old_old), k=min(suite.k for suite in retrieval), old_old=comparison.before, new_old=comparison.after,
        new_new=float(new_new.mean()), ci_low=comparison.bounds(level)[0], margin=margin,
        bridge=_bridge(asked, margin, level),
    )  # fmt: skip


def _bridge(asked: Sequence[_Asked], margin: float, level: float) -> Bridge | None:
    """None with too few images to fit and judge one."""
    old = np.concatenate([each.old_images[each.fitted] for each in asked])
    new = np.concatenate([each.new_images[each.fitted] for each in asked])
    judged = [each for each in asked if not each.fitted.all()]
    if len(old) < 2 or not judged:
        return None
    matrix = orthogonal_procrustes(old, new)[0].astype(np.float32)
    before = np.concatenate([each.hits(each.old_texts, each.old_images, ~each.fitted) for each in judged])
    after = np.concatenate([each.hits(each.new_texts, each.old_images @ matrix, ~each.fitted) for each in judged])
    comparison = compare_accuracy(before, after, margin=margin)
    low = comparison.bounds(level)[0]
    return Bridge(len(before), comparison.before, comparison.after, low, low > -margin, matrix)


def _is_fitted(item: Item) -> bool:
    """By the picture: copies of one are in the same half. Not by the hash of :func:`updater.gate.suite_items.of_half`:
    suites that tuned a merge are one of its halves already."""
    return int(digest_bytes(item.source.encode())[:8], 16) % 2 == 0


def store_bridge(artifacts: Artifacts, scorer: Scorer, verdict: Verdict) -> None:
    """Store the bridge that a verdict offers, if it does."""
    bridge = verdict.cross_version and verdict.cross_version.bridge
    if bridge and bridge.allowed:
        old, new = (scorer.engine.spaces(name).image for name in (verdict.incumbent, verdict.candidate))
        artifacts.write_bytes(bridge_key(old, new), dump_bridge(bridge.matrix))
