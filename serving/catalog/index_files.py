"""Builds the index of an image space from its table, and keeps it on the local disk between starts. A file holds codes
of vectors and digests of IDs; other fields are read from the table."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import zipfile
from pathlib import Path
from typing import Any, Final

import faiss
import lance
import numpy as np
import pyarrow as pa

from core.files import replacing
from serving.catalog.memory_index import CODINGS, Coding, MemoryIndex, choose_coding
from serving.catalog.row_columns import (
    BATCH_ROWS,
    LABELS,
    MOST_TEXT_BYTES,
    RowColumns,
    Vectors,
    digests_of,
    keys_of,
    unit_rows,
    vectors_of,
)

_faiss: Any = faiss
"""Its stubs lack readers and writers."""
COLUMNS: Final = ["id", "vector", "domain", "source", "time", "text", *LABELS]
_TRAINING_ROWS: Final = 64
"""Per partition."""
ROUNDS: Final = 10
_DIMENSIONS_A_CODE: Final = 4
"""Dimensions whose residuals share one of 16 codes."""
TEXTS: Final = 1000
"""Rows whose texts are measured to plan memory."""
SEED: Final = 0
_QUANTIZERS: Final = {
    16: faiss.ScalarQuantizer.QT_fp16, 8: faiss.ScalarQuantizer.QT_8bit, 4: faiss.ScalarQuantizer.QT_4bit,
}  # fmt: skip
log = logging.getLogger("ratchet.catalog")
FORMAT: Final = 2
UNFINISHED_SECONDS: Final = 3600.0
ABOUT, PARTITIONS, FINER, DIGESTS = "about.json", "partitions.faiss", "finer.faiss", "digests.npy"
ROW_COLUMNS: Final = [name for name in COLUMNS if name != "vector"]


def build_index(dataset: lance.LanceDataset, most_bytes: float) -> MemoryIndex:
    """Index all rows of a table version; about a minute of CPU time per million rows of 512 dimensions. Raises
    IndexTooLarge when no coding fits into ``most_bytes``."""
    threads = max(1, (os.cpu_count() or 1) // 2)
    faiss.omp_set_num_threads(threads)  # of this thread
    rows = dataset.count_rows()
    dimension = dataset.schema.field("vector").type.list_size
    texts = dataset.to_table(columns=["text"], limit=TEXTS)["text"].to_pylist()
    sizes = [size if (size := len((text or "").encode())) <= MOST_TEXT_BYTES else 0 for text in texts]
    coding = choose_coding(rows, dimension, float(np.mean(sizes)) if sizes else 0.0, most_bytes)
    index = _empty_index(_sample(dataset, rows), coding, rows)
    for batch in dataset.to_batches(columns=COLUMNS, batch_size=BATCH_ROWS):
        index.add(batch, at_once=BATCH_ROWS, threads=threads)
    return index


def _empty_index(sample: Vectors, coding: Coding, rows: int) -> MemoryIndex:
    """An empty index trained on a sample [n, dim] of the rows to add, with sqrt(rows) partitions."""
    dimension = sample.shape[1]
    count = max(1, min(len(sample), round(math.sqrt(rows))))
    clustering: Any = faiss.Kmeans(
        dimension, count, niter=ROUNDS, spherical=True, seed=SEED, min_points_per_centroid=1,
        max_points_per_centroid=2 * _TRAINING_ROWS,
    )  # fmt: skip
    clustering.train(sample)
    centroids = faiss.IndexFlatIP(dimension)
    centroids.add(clustering.centroids)
    codes = max(1, dimension // _DIMENSIONS_A_CODE)
    codes = next(number for number in range(codes, 0, -1) if dimension % number == 0)
    partitions = faiss.IndexIVFPQFastScan(centroids, dimension, count, codes, 4, faiss.METRIC_INNER_PRODUCT)
    partitions.by_residual = True
    partitions.pq.cp.min_points_per_centroid = 1
    partitions.pq.cp.seed = SEED
    partitions.train(sample)
    finer = None
    if coding.bits:
        finer = faiss.IndexScalarQuantizer(dimension, _QUANTIZERS[coding.bits], faiss.METRIC_INNER_PRODUCT)
        finer.train(sample)
    return MemoryIndex(partitions, finer, coding, RowColumns())


def _sample(dataset: lance.LanceDataset, rows: int) -> Vectors:
    count = min(rows, _TRAINING_ROWS * max(16, round(math.sqrt(rows))))
    chosen = np.sort(np.random.default_rng(SEED).choice(rows, count, replace=False))
    parts = [
        unit_rows(vectors_of(dataset.take(chosen[start : start + BATCH_ROWS].tolist(), columns=["vector"])))
        for start in range(0, count, BATCH_ROWS)
    ]
    return np.concatenate(parts)


class IndexFiles:
    """Index files of the tables under one URL, one per space. Use one thread at a time per space."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, space: str, index: MemoryIndex, built_rows: int) -> None:
        """Write an index to disk; its writers wait meanwhile. Raises OSError."""
        about = [FORMAT, faiss.__version__, space, index.coding.name, built_rows]
        parts = {PARTITIONS: index.partitions, FINER: index.finer}
        with replacing(self._path(space), mode=0o600, durable=False) as work, zipfile.ZipFile(work, "w") as archive:
            archive.writestr(ABOUT, json.dumps(about))
            for name, part in parts.items():
                if part is not None:
                    with archive.open(name, "w", force_zip64=True) as file:
                        _faiss.write_index(part, _faiss.PyCallbackIOWriter(file.write))
            with archive.open(DIGESTS, "w", force_zip64=True) as file:
                np.save(file, index.columns.digests())

    def load(self, space: str, dataset: lance.LanceDataset) -> tuple[MemoryIndex, int] | None:
        """Load an index without rows that the table no longer has, and the number of rows it was built from. None if
        there is none; damaged files and those of another version are removed."""
        if not self.exist(space):
            return None
        try:
            with zipfile.ZipFile(self._path(space)) as archive:  # checks CRC-32 of each part
                return self._load(space, archive, dataset)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile) as error:
            log.warning("the index of image space %s that was kept is made again: %s", space, error)
            self.remove(space)
            return None

    def exist(self, space: str) -> bool:
        return self._path(space).exists()

    def remove(self, space: str) -> None:
        self._path(space).unlink(missing_ok=True)

    def remove_others(self, spaces: set[str]) -> None:
        """Remove the files of all other spaces, and abandoned temporary files."""
        kept = {self._path(space).name for space in spaces}
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            finished = not path.name.startswith(".")
            if path.name not in kept and (finished or time.time() - path.stat().st_mtime > UNFINISHED_SECONDS):
                path.unlink(missing_ok=True)

    def _load(self, space: str, archive: zipfile.ZipFile, dataset: lance.LanceDataset) -> tuple[MemoryIndex, int]:
        *version, coding_name, built_rows = json.loads(archive.read(ABOUT))
        if version != [FORMAT, faiss.__version__, space]:
            raise ValueError("it was written by another version")
        coding = {each.name: each for each in CODINGS}[coding_name]
        partitions = _read(archive, PARTITIONS)
        finer = _read(archive, FINER) if coding.bits else None
        with archive.open(DIGESTS) as file:
            digests = np.load(file, allow_pickle=False)
        if partitions.ntotal > len(digests) or (finer is not None and finer.ntotal != len(digests)):
            raise ValueError("its parts are of different rows")
        if partitions.d != dataset.schema.field("vector").type.list_size:
            raise ValueError("its vectors have another dimension")
        index = MemoryIndex(partitions, finer, coding, RowColumns())
        if _fill(index, digests, dataset):
            self.remove(space)  # it contains removed rows
        return index, int(built_rows)

    def _path(self, space: str) -> Path:
        return self._folder / f"{space}.index"


def _read(archive: zipfile.ZipFile, name: str) -> Any:
    with archive.open(name) as file:
        return _faiss.read_index(_faiss.PyCallbackIOReader(file.read))


def _fill(index: MemoryIndex, digests: Any, dataset: lance.LanceDataset) -> int:
    """Read the rows' fields, and remove rows that the table no longer has; returns their number."""
    columns = index.columns
    columns.allocate(len(digests))
    keys = keys_of(digests)
    order = np.argsort(keys)
    ordered = keys[order]
    filled = np.zeros(len(digests), np.bool_)
    for batch in dataset.to_batches(columns=ROW_COLUMNS) if len(digests) else ():
        wanted = digests_of(batch.column("id"))
        places = order[np.minimum(np.searchsorted(ordered, keys_of(wanted)), len(ordered) - 1)]
        known = (digests[places] == wanted).all(axis=1)
        positions = places[known].astype(np.int64)
        columns.write(positions, batch.filter(pa.array(known, pa.bool_())))
        filled[positions] = True
    gone = np.flatnonzero(digests.any(axis=1) & ~filled).astype(np.int64)
    index.drop_codes(gone)
    return len(gone)
