"""Makes the index of one image space from its table."""

from __future__ import annotations

import math
import os
from typing import Any, Final

import faiss
import lance
import numpy as np

from serving.catalog.codings import Coding, choose_coding
from serving.catalog.memory_index import MemoryIndex
from serving.catalog.row_columns import MOST_TEXT_BYTES, RowColumns
from serving.catalog.table_files import BATCH_ROWS, Vectors, unit_rows, vectors_of

COLUMNS: Final = ["id", "vector", "domain", "source", "time", "text"]
TRAINING_ROWS: Final = 64
"""For each partition."""
ROUNDS: Final = 10
DIMENSIONS_A_CODE: Final = 4
"""Whose residuals share one of 16 codes."""
TEXTS: Final = 1000
"""Rows whose texts are measured before memory is planned."""
SEED: Final = 0
QUANTIZERS: Final = {
    16: faiss.ScalarQuantizer.QT_fp16, 8: faiss.ScalarQuantizer.QT_8bit, 4: faiss.ScalarQuantizer.QT_4bit,
}  # fmt: skip


def build_index(dataset: lance.LanceDataset, most_bytes: float) -> MemoryIndex:
    """An index of all rows of a version. Takes about a minute of processor time for a million of 512 dimensions.

    Raises:
        IndexTooLarge: it does not fit into so many bytes, however it is coded.
    """
    threads = max(1, (os.cpu_count() or 1) // 2)
    faiss.omp_set_num_threads(threads)  # of this thread
    rows = dataset.count_rows()
    dimension = dataset.schema.field("vector").type.list_size
    coding = choose_coding(rows, dimension, _text_bytes(dataset), most_bytes)
    index = empty_index(_sample(dataset, rows), coding, rows)
    for batch in dataset.to_batches(columns=COLUMNS, batch_size=BATCH_ROWS):
        index.add(batch, at_once=BATCH_ROWS, threads=threads)
    return index


def empty_index(sample: Vectors, coding: Coding, rows: int) -> MemoryIndex:
    """One without rows, trained on a sample [n, dim] of those that are to be added: as many partitions as the root of
    their number.
    """
    dimension = sample.shape[1]
    count = max(1, min(len(sample), round(math.sqrt(rows))))
    clustering: Any = faiss.Kmeans(
        dimension, count, niter=ROUNDS, spherical=True, seed=SEED, min_points_per_centroid=1,
        max_points_per_centroid=2 * TRAINING_ROWS,
    )  # fmt: skip
    clustering.train(sample)
    centroids = faiss.IndexFlatIP(dimension)
    centroids.add(clustering.centroids)
    partitions = faiss.IndexIVFPQFastScan(
        centroids, dimension, count, _subspaces(dimension), 4, faiss.METRIC_INNER_PRODUCT
    )
    partitions.by_residual = True
    partitions.pq.cp.min_points_per_centroid = 1
    partitions.pq.cp.seed = SEED
    partitions.train(sample)
    return MemoryIndex(partitions, _finer(sample, coding), coding, RowColumns())


def _finer(sample: Vectors, coding: Coding) -> Any | None:
    if not coding.bits:
        return None
    finer = faiss.IndexScalarQuantizer(sample.shape[1], QUANTIZERS[coding.bits], faiss.METRIC_INNER_PRODUCT)
    finer.train(sample)
    return finer


def _subspaces(dimension: int) -> int:
    """The most that divide the dimension, up to a fourth of it."""
    return next(count for count in range(max(1, dimension // DIMENSIONS_A_CODE), 0, -1) if dimension % count == 0)


def _sample(dataset: lance.LanceDataset, rows: int) -> Vectors:
    count = min(rows, TRAINING_ROWS * max(16, round(math.sqrt(rows))))
    chosen = np.sort(np.random.default_rng(SEED).choice(rows, count, replace=False))
    parts = [
        unit_rows(vectors_of(dataset.take(chosen[start : start + BATCH_ROWS].tolist(), columns=["vector"])))
        for start in range(0, count, BATCH_ROWS)
    ]
    return np.concatenate(parts)


def _text_bytes(dataset: lance.LanceDataset) -> float:
    """Of a row, on average, as far as texts are kept in memory."""
    texts = dataset.to_table(columns=["text"], limit=TEXTS)["text"].to_pylist()
    sizes = [size if (size := len((text or "").encode())) <= MOST_TEXT_BYTES else 0 for text in texts]
    return float(np.mean(sizes)) if sizes else 0.0
