"""Search across versions: texts of a new model in an index that the old one made, wholly or in part.

A backward map takes new queries into the old space. It is fitted on the quarter of the index that is embedded anew
first, images alone: what a release would have after some minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.continual.backward_map import SHARES, BackwardMap, Index, fit, recall, recall_while_backfilling
from benchmarks.continual.evaluation import Encoded, Vectors, images_of, right_images, texts_of
from benchmarks.continual.stream import RECALL_AT, Suite

FITTED = 0.25


def cross_version_recall(suites: Sequence[Suite], previous: Encoded, now: Encoded, base: Encoded) -> dict[str, float]:
    """Recall at 5 of texts in images, mean over retrieval suites, by the versions of both.

    ``old_old`` is the version before; ``new_at_0`` to ``new_at_1`` are new queries while 0 to all of its index are
    embedded anew, ``mapped_at_...`` the same with a map for what is still old; ``new_base``, ``mapped_base`` meet the
    index of the base.
    """
    retrieval = [suite for suite in suites if suite.task == "retrieval"]
    back, to_base = _map(retrieval, now, previous), _map(retrieval, now, base)
    by_suite = [_one(suite, previous, now, back) | _base(suite, base, now, to_base) for suite in retrieval]
    return {name: float(np.mean([each[name] for each in by_suite])) for name in by_suite[0]}


def _one(suite: Suite, previous: Encoded, now: Encoded, back: BackwardMap) -> dict[str, float]:
    index = Index(images_of(suite, previous), images_of(suite, now))
    texts, right = texts_of(suite, now), right_images(suite)
    plain = recall_while_backfilling(texts, index, right, k=RECALL_AT)
    mapped = recall_while_backfilling(texts, index, right, back=back, k=RECALL_AT)
    return {
        "old_old": recall(texts_of(suite, previous), index.old, right, RECALL_AT),
        **{f"new_at_{share:g}": plain[share] for share in SHARES},
        **{f"mapped_at_{share:g}": mapped[share] for share in SHARES},
    }


def _base(suite: Suite, base: Encoded, now: Encoded, back: BackwardMap) -> dict[str, float]:
    index, texts, right = images_of(suite, base), texts_of(suite, now), right_images(suite)
    return {
        "new_base": recall(texts, index, right, RECALL_AT),
        "mapped_base": recall(back.apply(texts), index, right, RECALL_AT),
    }


def _map(suites: Sequence[Suite], new: Encoded, old: Encoded) -> BackwardMap:
    """Only turns the space: with so few samples a freer map would fit them and nothing else."""
    sides: list[Vectors] = []
    for version in (new, old):
        parts = []
        for suite in suites:
            vectors = images_of(suite, version)
            parts.append(vectors[Index(vectors, vectors).backfilled(FITTED)])
        sides.append(np.concatenate(parts))
    return fit(sides[0], sides[1], "procrustes")
