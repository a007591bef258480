"""The approximate in-memory index of one image space: faiss for vectors, :class:`RowColumns` for the rest. Vectors are
partitioned around centroids. A product-quantized code of each row's residual (1/8 byte per dimension) finds candidates
(Jégou et al. 2011; in the layout of André et al., "Quicker ADC", 2019, for 32 rows at a time), and a second code, the
finest that fits into memory, ranks them. Positions are faiss's IDs."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from core.errors import StoreError
from serving.catalog.queries import Filters, Hit
from serving.catalog.row_columns import (
    ROW_BYTES,
    Keys,
    Positions,
    RowColumns,
    Vectors,
    digests_of,
    keys_of,
    unit_rows,
    vectors_of,
)

_faiss: Any = faiss
"""Its stubs lack keyword parameters and block lists."""
ADD_ROWS: Final = 128
"""Rows added under one lock: searches wait some milliseconds."""
FEW_ROWS: Final = 512
"""Up to this many rows that meet a filter are all scored."""
FILTERS: Final = 32
"""Filters whose rows are cached, as one bit per row, until the index changes."""
LEAST_CANDIDATES_A_HIT: Final = 4
DEPTH: Final = 10
"""Least rows in the searched partitions, in hits that are asked for."""
ID_BYTES: Final = 8
ROOM: Final = 1.15
"""Arrays grow ahead of their rows."""


class IndexTooLarge(StoreError):
    """An index does not fit into memory with any coding."""


@dataclass(frozen=True, slots=True)
class Coding:
    name: str
    bits: int
    """Bits per dimension; 0: no finer code, and candidates are ranked by the first one."""

    def row_bytes(self, dimension: int) -> float:
        return dimension / 8 + ID_BYTES + dimension * self.bits / 8


CODINGS: Final = (Coding("16 bits", 16), Coding("8 bits", 8), Coding("4 bits", 4), Coding("quantized alone", 0))


def choose_coding(rows: int, dimension: int, text_bytes: float, most_bytes: float) -> Coding:
    """The finest coding that fits ``most_bytes`` in total. ``text_bytes``: mean per row. Raises IndexTooLarge."""
    for coding in CODINGS:
        size = estimated_bytes(rows, dimension, text_bytes, coding)
        if size <= most_bytes:
            return coding
    raise IndexTooLarge(
        f"an index of {rows} rows takes {size / 2**30:.2f} GiB, and may take {most_bytes / 2**30:.2f} GiB.",
        "Raise catalog.cache_gib; until then searches are exact.",
    )


def estimated_bytes(rows: int, dimension: int, text_bytes: float, coding: Coding) -> float:
    return rows * ROOM * (coding.row_bytes(dimension) + ROW_BYTES + text_bytes)


@dataclass(frozen=True, slots=True)
class Level:
    partitions: int
    """Partitions searched; more if a filter leaves few rows."""
    candidates: int


LEVELS: Final = (
    Level(4, 80), Level(8, 120), Level(16, 160), Level(32, 160), Level(64, 240), Level(128, 480), Level(256, 960),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Effort:
    plain: Level
    filtered: Level

    def __str__(self) -> str:
        return f"{self.plain.partitions} partitions, {self.filtered.partitions} and more under a filter"


class MemoryIndex:
    """Any number of threads may search, one at a time may write."""

    def __init__(self, partitions: Any, finer: Any | None, coding: Coding, columns: RowColumns) -> None:
        """``partitions``: an ``IndexIVFPQFastScan`` (see :mod:`index_files`) whose IDs are positions in ``columns``;
        ``finer``: an ``IndexScalarQuantizer`` of all positions, or None."""
        self.partitions = partitions
        self.finer = finer
        self.coding = coding
        self.columns = columns
        self.dimension = int(partitions.d)
        self._engine = partitions if finer is None else _refined(partitions, finer)
        self._lock = _ReadWriteLock()
        self._masks: dict[Filters, tuple[Any, int]] = {}

    @property
    def rows(self) -> int:
        return self.columns.rows

    @property
    def bytes(self) -> int:
        return round(self.columns.bytes + self.columns.end * self.coding.row_bytes(self.dimension))

    def contains(self, keys: Keys) -> npt.NDArray[np.bool_]:
        """True for keys whose row is here. For the writing thread only."""
        return self.columns.positions(keys) >= 0

    def add(self, data: pa.RecordBatch | pa.Table, at_once: int = ADD_ROWS, threads: int = 1) -> None:
        """Add the rows (with all columns of the table) that are new. ``at_once``: rows per lock, for which
        searches wait; ``threads``: that compute."""
        faiss.omp_set_num_threads(threads)  # of this thread
        keys = keys_of(digests_of(data.column("id")))
        _, first = np.unique(keys, return_index=True)
        new = np.sort(first[~self.contains(keys[first])])
        for start in range(0, len(new), at_once):
            self._add(data.take(pa.array(new[start : start + at_once], pa.int64())))

    def remove(self, keys: Keys) -> None:
        """Remove rows and overwrite their bytes. Unknown keys are ignored."""
        positions = np.unique(self.columns.positions(keys))
        positions = positions[positions >= 0]
        with self._lock.writing():
            self.drop_codes(positions)
            self.columns.remove(positions)
            self._masks.clear()

    def drop_codes(self, positions: Positions) -> None:
        """Remove the codes of positions without a row. Not while others search."""
        if not len(positions):
            return
        _take_out(self.partitions, positions)
        if self.finer is not None:
            codes = faiss.rev_swig_ptr(self.finer.codes.data(), self.finer.ntotal * self.finer.code_size)
            codes.reshape(-1, self.finer.code_size)[positions] = 0

    def search(self, vectors: Vectors, k: int, filters: Filters, effort: Effort) -> tuple[list[list[Hit]], list[str]]:
        """The ``k`` nearest rows to each vector [n, dim], best first, ties by ID, and the IDs of hits whose text is
        only in the table. Scores have the precision of the finer code."""
        queries = unit_rows(vectors)
        faiss.omp_set_num_threads(1)  # of this thread: concurrent callers use a core each
        with self._lock.reading():
            found: list[list[Hit]] = []
            lacking: set[str] = set()
            for scores, positions in zip(
                *self._nearest(queries, min(k, max(1, self.rows)), filters, effort), strict=True
            ):
                count = len(positions) - positions.count(-1)  # missing hits are last
                hits, without_text = self.columns.hits(positions[:count], scores[:count])
                found.append(sorted(hits, key=lambda hit: (-hit.score, hit.id)))
                lacking.update(without_text)
        return found, sorted(lacking)

    def _nearest(
        self, queries: Vectors, k: int, filters: Filters, effort: Effort
    ) -> tuple[list[list[float]], list[list[int]]]:
        """Scores and positions [n, k]; -1 for missing hits, the last ones."""
        if filters == Filters():
            return self._search(queries, k, effort.plain)
        selected, count = self._mask(filters)
        if not count:
            return [[]] * len(queries), [[]] * len(queries)
        if count <= FEW_ROWS and self.finer is not None:
            return self._score_all(queries, selected, k)
        share = math.sqrt(count / max(1, self.rows))
        level = replace(
            effort.filtered, partitions=min(self.partitions.nlist, round(effort.filtered.partitions / share))
        )
        return self._search(queries, k, level, _faiss.IDSelectorBitmap(selected))

    def _score_all(self, queries: Vectors, positions: Positions, k: int) -> tuple[list[list[float]], list[list[int]]]:
        vectors = self.finer.reconstruct_batch(positions)  # type: ignore[union-attr]
        scores = np.einsum("nd,qd->qn", vectors, queries)  # not BLAS, whose threads concurrent callers would wait for
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, best, 1).tolist(), positions[best].tolist()

    def _search(
        self, queries: Vectors, k: int, level: Level, selector: Any = None
    ) -> tuple[list[list[float]], list[list[int]]]:
        deep = math.ceil(DEPTH * k / max(1, self.rows) * self.partitions.nlist)
        partitions = min(max(level.partitions, deep), self.partitions.nlist)
        factor = None if self.finer is None else max(float(LEAST_CANDIDATES_A_HIT), level.candidates / k)
        make = _parameters if selector is None else _parameters.__wrapped__
        scores, positions = self._engine.search(queries, k, params=make(partitions, factor, selector))
        return scores.tolist(), positions.tolist()

    def _mask(self, filters: Filters) -> tuple[Any, int]:
        """Positions that meet the conditions if they are few, else a bit per position; and their number."""
        if (known := self._masks.get(filters)) is not None:
            return known
        mask = self.columns.matching(filters)
        count = int(np.count_nonzero(mask))
        few = count <= FEW_ROWS and self.finer is not None
        selected = np.flatnonzero(mask).astype(np.int64) if few else np.packbits(mask, bitorder="little")
        if len(self._masks) >= FILTERS:
            self._masks.clear()
        self._masks[filters] = selected, count
        return selected, count

    def _add(self, rows: pa.RecordBatch | pa.Table) -> None:
        vectors = unit_rows(vectors_of(rows))
        with self._lock.writing():
            positions = self.columns.allocate(rows.num_rows)
            self.columns.write(positions, rows)
            self.partitions.add_with_ids(vectors, positions)
            if self.finer is not None:
                self.finer.add(vectors)
                self._engine.ntotal = self.finer.ntotal
            self._masks.clear()


@lru_cache(maxsize=64)
def _parameters(partitions: int, factor: float | None, selector: Any) -> Any:
    """Search parameters, read only. Cached without a selector: making them takes a tenth of a search."""
    chosen = {} if selector is None else {"sel": selector}
    parameters = _faiss.SearchParametersIVF(nprobe=partitions, **chosen)
    if factor is None:
        return parameters
    return _faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=parameters)


def _refined(partitions: Any, finer: Any) -> Any:
    """faiss's two-stage search, whose constructor requires equal row counts; only ``finer`` has removed positions."""
    rows, partitions.ntotal = partitions.ntotal, finer.ntotal
    engine = faiss.IndexRefine(partitions, finer)
    partitions.ntotal = rows
    return engine


def _take_out(partitions: Any, positions: Positions) -> None:
    """Remove codes, and overwrite what faiss leaves behind the end of its lists."""
    lists = _faiss.downcast_InvertedLists(partitions.invlists)
    before = [lists.list_size(number) for number in range(partitions.nlist)]
    partitions.remove_ids(faiss.IDSelectorBatch(positions))
    nothing = np.zeros(partitions.code_size, np.uint8)
    for number, size in enumerate(before):
        rows = lists.list_size(number)
        if rows == size or not rows:
            continue
        blocks = -(-rows // lists.n_per_block)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), blocks * lists.block_size).reshape(blocks, -1)
        for slot in range(rows, blocks * lists.n_per_block):
            lists.packer.pack_1(nothing, slot, codes)


class _ReadWriteLock:
    """A lock that readers share and the writer holds alone. A waiting writer goes before later readers."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._readers = 0
        self._writing = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._free:
            self._free.wait_for(lambda: not self._writing)
            self._readers += 1
        try:
            yield
        finally:
            with self._free:
                self._readers -= 1
                if self._writing:
                    self._free.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._free:
            self._writing = True
            self._free.wait_for(lambda: not self._readers)
        try:
            yield
        finally:
            with self._free:
                self._writing = False
                self._free.notify_all()
