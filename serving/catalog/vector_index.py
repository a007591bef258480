"""The approximate index of one table, as operations on its Lance dataset.

Rows that came after the index was made are searched exactly beside it. Each :func:`extend` indexes them as a segment of
its own; segments are merged when there are many. Data files of indexed rows are never merged with others: that would
move rows, and a row that moves costs an entry in the index.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import lance
import numpy as np
import numpy.typing as npt

log = logging.getLogger("ratchet.catalog")
KIND: Final = "IVF_RQ"
NAME: Final = "nearest"
SCALAR: Final = {"by_id": ("id", "BTREE"), "by_domain": ("domain", "BITMAP"), "by_source": ("source", "BITMAP"),
                 "by_time": ("time", "BTREE")}  # fmt: skip
MOST_SEGMENTS: Final = 8
TARGET_ROWS: Final = 65_536
"""Of a data file after small ones were merged."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How hard a search through the index tries."""

    nprobes: int
    """Partitions that are looked into."""
    refine: int
    """So many times the asked number of rows is scored exactly."""


EFFORTS: Final = (Effort(4, 4), Effort(8, 4), Effort(16, 6), Effort(32, 8), Effort(64, 10), Effort(128, 16))
"""The cheapest first. A space is searched with the cheapest one whose recall is enough."""


@dataclass(frozen=True, slots=True)
class IndexState:
    """What an index covers."""

    rows: int
    """Of the table."""
    indexed: int
    segments: int

    @property
    def exists(self) -> bool:
        """Whether there is an index."""
        return self.segments > 0

    @property
    def unindexed(self) -> int:
        """Rows that are searched exactly, beside the index or without one."""
        return max(0, self.rows - self.indexed)


def read_state(dataset: lance.LanceDataset) -> IndexState:
    """Of the version that the dataset is at."""
    rows = dataset.count_rows()
    index = _described(dataset).get(NAME)
    if index is None:
        return IndexState(rows, 0, 0)
    covered = _fragments(index)
    indexed = sum(each.count_rows() for each in dataset.get_fragments() if each.fragment_id in covered)
    return IndexState(rows, indexed, len(index.segments))


def build(dataset: lance.LanceDataset) -> None:
    """Make the index, or make it anew. Takes minutes for a million rows."""
    merge_files(dataset)
    rows = dataset.count_rows()
    dataset.create_index(
        "vector", KIND, name=NAME, metric="cosine", replace=True, num_partitions=max(1, round(math.sqrt(rows)))
    )
    for name, (column, kind) in SCALAR.items():
        dataset.create_scalar_index(column, kind, name=name, replace=True)


def extend(dataset: lance.LanceDataset) -> None:
    """Bring the rows that came since into the indexes."""
    merge_files(dataset)
    for name, index in _described(dataset).items():
        merged = len(index.segments) if len(index.segments) >= MOST_SEGMENTS else 0
        dataset.optimize.optimize_indices(num_indices_to_merge=merged, index_names=[name])


def merge_files(dataset: lance.LanceDataset) -> None:
    """Merge small data files, without those of rows that are indexed."""
    index = _described(dataset).get(NAME)
    covered = [] if index is None else sorted(_fragments(index))
    dataset.optimize.compact_files(target_rows_per_fragment=TARGET_ROWS, excluded_fragment_ids=covered)


def write_out_deletions(dataset: lance.LanceDataset) -> None:
    """Write the data files anew that still hold the bytes of removed rows.

    Not LanceDB's optimize: that leaves a file as it is of which less than a tenth was removed.
    """
    clean = [each.fragment_id for each in dataset.get_fragments() if not each.num_deletions]
    dataset.optimize.compact_files(
        target_rows_per_fragment=1, materialize_deletions=True, materialize_deletions_threshold=0.0,
        excluded_fragment_ids=clean,
    )  # fmt: skip


def exact_scores(
    dataset: lance.LanceDataset, queries: npt.NDArray[np.float32], k: int, condition: str = ""
) -> list[npt.NDArray[np.float32]]:
    """Cosine similarities of the ``k`` nearest rows to each of the queries [n, dim], best first, without an index.

    In one pass over the table, which holds some thousand vectors in memory at once.
    """
    unit = queries / np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), 1e-12)
    best = np.full((len(queries), 0), -np.inf, np.float32)
    for vectors in _vectors(dataset, condition):
        scores = unit @ (vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)).T
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, :k]
    return list(best)


def _vectors(dataset: lance.LanceDataset, condition: str) -> Iterable[npt.NDArray[np.float32]]:
    batches = dataset.to_batches(columns=["vector"], filter=condition or None, batch_size=4096)
    for batch in batches:
        if batch.num_rows:
            column = batch.column("vector")
            yield column.flatten().to_numpy(zero_copy_only=False).reshape(batch.num_rows, -1)


def _described(dataset: lance.LanceDataset) -> dict[str, Any]:
    return {each.name: each for each in dataset.describe_indices()}


def _fragments(index: Any) -> set[int]:
    return {int(number) for segment in index.segments for number in segment.fragment_ids}
