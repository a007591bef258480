"""Vectors distributed like embeddings: in clusters of unequal sizes, each spread in few directions.

Uniform noise would be useless: in 512 dimensions all its vectors are equally far from each other. Here 1,000 centres of
unit length come from a space of 128 dimensions with a falling spectrum; a vector belongs to cluster c with a
probability proportional to 1/(c + 1), and deviates from its centre in 32 directions of that cluster, and a little in
all. Queries are further draws of the same mixture, which are in no index.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
DIMENSIONS: Final = 512
CLUSTERS: Final = 1_000
CENTRE_RANK, CLUSTER_RANK = 128, 32
SPREAD, NOISE = 0.7, 0.3
"""Length of a vector's deviation from its centre, within its cluster's directions and in all."""
CHUNK_ROWS: Final = 10_000
QUERY_STREAM: Final = 1 << 30
NEIGHBOURS: Final = 10


class Mixture:
    """The same vectors for the same seed, chunk by chunk."""

    def __init__(self, seed: int = 0, dimensions: int = DIMENSIONS, clusters: int = CLUSTERS) -> None:
        random = np.random.default_rng(seed)
        self._seed, self._dimensions = seed, dimensions
        spectrum = (1 + np.arange(CENTRE_RANK)) ** -0.5
        basis = random.normal(size=(CENTRE_RANK, dimensions))
        self._centres = _unit(((random.normal(size=(clusters, CENTRE_RANK)) * spectrum) @ basis).astype(np.float32))
        axes = random.normal(size=(clusters, CLUSTER_RANK, dimensions)).astype(np.float32)
        self._axes = axes * np.float32(SPREAD / np.sqrt(dimensions * CLUSTER_RANK))
        shares = 1 / (1 + np.arange(clusters))
        self._shares = shares / shares.sum()

    def rows(self, count: int) -> Iterator[Vectors]:
        """This many vectors of unit length, in chunks [n, dim]."""
        for start in range(0, count, CHUNK_ROWS):
            yield self._draw(start // CHUNK_ROWS)[: count - start]

    def queries(self, count: int) -> Vectors:
        """Vectors [count, dim] that are not among the rows."""
        return np.concatenate([self._draw(QUERY_STREAM + start) for start in range(0, count, CHUNK_ROWS)])[:count]

    def _draw(self, number: int) -> Vectors:
        random = np.random.default_rng([self._seed, number])
        clusters = random.choice(len(self._shares), CHUNK_ROWS, p=self._shares)
        along = random.normal(size=(CHUNK_ROWS, CLUSTER_RANK)).astype(np.float32)
        noise = random.normal(size=(CHUNK_ROWS, self._dimensions)).astype(np.float32)
        vectors = self._centres[clusters] + noise * np.float32(NOISE / np.sqrt(self._dimensions))
        for cluster in np.unique(clusters):
            members = clusters == cluster
            vectors[members] += along[members] @ self._axes[cluster]
        return _unit(vectors)


def write_rows(mixture: Mixture, path: Path, count: int) -> None:
    """float32 [count, dim] in one file, which processes map."""
    with path.open("wb") as file:
        for chunk in mixture.rows(count):
            file.write(chunk.tobytes())


def map_rows(path: Path, dimensions: int = DIMENSIONS) -> Vectors:
    return np.asarray(np.memmap(path, np.float32, "r").reshape(-1, dimensions))


def true_scores(rows: Vectors, queries: Vectors, k: int = NEIGHBOURS) -> Vectors:
    """Cosine similarities [n, k] of the ``k`` nearest rows to each query, best first; both of unit length."""
    best = np.full((len(queries), 0), -np.inf, np.float32)
    for start in range(0, len(rows), CHUNK_ROWS):
        scores = np.concatenate([best, queries @ rows[start : start + CHUNK_ROWS].T], axis=1)
        best = -np.sort(-np.partition(scores, -k, axis=1)[:, -k:], axis=1) if scores.shape[1] > k else scores
    return np.asarray(-np.sort(-best, axis=1), np.float32)


def _unit(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
