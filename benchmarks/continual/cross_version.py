"""Search across versions: texts of a new model in an index of the old one, partly or not yet rebuilt.

A backward map (BC-Aligner) takes new queries into the old space while the index is embedded again. It is fitted on the
images of the quarter of the index that is embedded first: what a release would have after some minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes

from benchmarks.continual.evaluation import Bools, Encoded, Vectors, images_of, right_images, texts_of
from benchmarks.continual.stream import RECALL_AT, Suite
from updater.gate.score import rank_of_best

SHARES = (0.0, 0.25, 0.5, 1.0)
FITTED = 0.25


def cross_version_recall(suites: Sequence[Suite], previous: Encoded, now: Encoded, base: Encoded) -> dict[str, float]:
    """Recall at 5 of texts in images, mean over retrieval suites, by the versions of both.

    ``old_old`` is the version before; ``new_at_0`` to ``new_at_1`` are new queries with none to all of the index
    embedded again, ``mapped_at_...`` the same with a map for the old part; ``new_base`` and ``mapped_base`` use the
    index of the base.
    """
    retrieval = [suite for suite in suites if suite.task == "retrieval"]
    back, to_base = _map(retrieval, now, previous), _map(retrieval, now, base)
    by_suite = [_of_suite(suite, previous, now, base, back, to_base) for suite in retrieval]
    return {name: float(np.mean([each[name] for each in by_suite])) for name in by_suite[0]}


def _of_suite(
    suite: Suite, previous: Encoded, now: Encoded, base: Encoded, back: NDArray[np.float64],
    to_base: NDArray[np.float64],
) -> dict[str, float]:  # fmt: skip
    old, new, texts, right = (
        images_of(suite, previous),
        images_of(suite, now),
        texts_of(suite, now),
        right_images(suite),
    )
    based = images_of(suite, base)
    renewed = texts @ new.T

    def filling(queries: Vectors) -> list[float]:
        """Recall of queries to the old vectors at each share of the index that is new."""
        kept = queries @ old.T
        return [_recall(np.where(backfilled(len(old), share)[None], renewed, kept), right) for share in SHARES]

    mapped = filling(apply(back, texts))
    return {
        "old_old": _recall(texts_of(suite, previous) @ old.T, right),
        **{f"new_at_{share:g}": found for share, found in zip(SHARES, filling(texts), strict=True)},
        **{f"mapped_at_{share:g}": found for share, found in zip(SHARES, mapped, strict=True)},
        "new_base": _recall(texts @ based.T, right),
        "mapped_base": _recall(apply(to_base, texts) @ based.T, right),
    }


def _map(suites: Sequence[Suite], new: Encoded, old: Encoded) -> NDArray[np.float64]:
    """z_old ~ z_new @ map, float64 [dim, dim]. A rotation (Procrustes): a freer map would overfit so few samples."""
    sides = []
    for version in (new, old):
        vectors = [images_of(suite, version) for suite in suites]
        sides.append(np.concatenate([each[backfilled(len(each), FITTED)] for each in vectors]).astype(np.float64))
    return np.asarray(orthogonal_procrustes(*sides)[0])


def apply(back: NDArray[np.float64], features: Vectors) -> Vectors:
    """Features [n, dim] in the old space, of unit length."""
    mapped = features.astype(np.float64) @ back
    lengths = np.maximum(np.linalg.norm(mapped, axis=1, keepdims=True), 1e-12)
    return np.asarray(mapped / lengths, dtype=np.float32)


def backfilled(count: int, share: float) -> Bools:
    """Rows of an index of ``count`` that hold new vectors: a random share, where a larger share includes a
    smaller one.
    """
    done = np.zeros(count, dtype=bool)
    done[np.random.default_rng(0).permutation(count)[: round(share * count)]] = True
    return done


def _recall(similarity: NDArray[np.floating], right: Bools) -> float:
    """Share of queries with a right image among the most similar; both [queries, images]."""
    return float((rank_of_best(similarity, right) < RECALL_AT).mean())
