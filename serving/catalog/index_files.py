"""Indexes on the local disk, so that a start need not make them anew.

They hold codes of vectors and digests of ids; what hits say of their rows is read from the tables.

A folder per space, which appears with all of its files at once and is never changed.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, Final

import faiss
import lance
import numpy as np
import pyarrow as pa

from core.files import flush
from serving.catalog.index_training import COLUMNS
from serving.catalog.memory_index import MemoryIndex, coding_named
from serving.catalog.row_columns import RowColumns
from serving.catalog.sample_digests import digests_of, keys_of

log = logging.getLogger("ratchet.catalog")
FORMAT: Final = 1
META: Final = "meta.json"
MOST_META_BYTES: Final = 1 << 16
UNFINISHED: Final = ".unfinished-"
UNFINISHED_SECONDS: Final = 3600.0
PARTITIONS, FINER, DIGESTS = "partitions.faiss", "finer.faiss", "digests.npy"
ROW_COLUMNS: Final = [name for name in COLUMNS if name != "vector"]


class IndexFiles:
    """The indexes of the tables under one URL. Use for a space from one thread at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, space: str, index: MemoryIndex, built_rows: int) -> None:
        """Keep an index, whose writers wait meanwhile. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self._folder))
        try:
            faiss.write_index(index.partitions, str(unfinished / PARTITIONS))
            if index.finer is not None:
                faiss.write_index(index.finer, str(unfinished / FINER))
            np.save(unfinished / DIGESTS, index.columns.digests())
            sums = {path.name: _checksum(path) for path in unfinished.iterdir()}
            meta = {"format": FORMAT, "faiss": faiss.__version__, "space": space, "coding": index.coding.name,
                    "built_rows": built_rows, "files": sums}  # fmt: skip
            (unfinished / META).write_text(json.dumps(meta))
            for path in unfinished.iterdir():
                flush(path)
            self.remove(space)
            unfinished.rename(self._path(space))
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def load(self, space: str, dataset: lance.LanceDataset) -> tuple[MemoryIndex, int] | None:
        """The index that was kept, with those of its rows that a version of the table has; and of how many rows it was
        made. None where there is none, or where it is damaged or of another version: then its files are removed.
        """
        if not self._path(space).exists():
            return None
        try:
            return self._load(space, dataset)
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            log.warning("the index of image space %s that was kept is made anew: %s", space, error)
            self.remove(space)
            return None

    def exist(self, space: str) -> bool:
        """Whether the index of a space is kept."""
        return self._path(space).exists()

    def remove(self, space: str) -> None:
        """Remove the files of a space, if there are any."""
        shutil.rmtree(self._path(space), ignore_errors=True)

    def remove_others(self, spaces: set[str]) -> None:
        """Remove the files of all other spaces, and what a process that has ended did not finish."""
        for path in self._folder.iterdir() if self._folder.is_dir() else ():
            finished = not path.name.startswith(UNFINISHED)
            if path.name not in spaces and (finished or time.time() - path.stat().st_mtime > UNFINISHED_SECONDS):
                shutil.rmtree(path, ignore_errors=True)

    def _load(self, space: str, dataset: lance.LanceDataset) -> tuple[MemoryIndex, int]:
        folder = self._path(space)
        with (folder / META).open("rb") as file:
            meta: dict[str, Any] = json.loads(file.read(MOST_META_BYTES))
        if (meta["format"], meta["faiss"], meta["space"]) != (FORMAT, faiss.__version__, space):
            raise ValueError("it was written by another version")
        coding = coding_named(meta["coding"])
        for name in (PARTITIONS, DIGESTS, *([FINER] if coding.bits else [])):
            if _checksum(folder / name) != meta["files"][name]:
                raise ValueError(f"{name} is damaged")
        partitions = faiss.read_index(str(folder / PARTITIONS))
        finer = faiss.read_index(str(folder / FINER)) if coding.bits else None
        digests = np.load(folder / DIGESTS, allow_pickle=False)
        if partitions.ntotal > len(digests) or (finer is not None and finer.ntotal != len(digests)):
            raise ValueError("its files are of different rows")
        if partitions.d != dataset.schema.field("vector").type.list_size:
            raise ValueError("its vectors have another dimension")
        index = MemoryIndex(partitions, finer, coding, RowColumns())
        if _fill(index, digests, dataset):
            self.remove(space)  # it holds rows that were removed
        return index, int(meta["built_rows"])

    def _path(self, space: str) -> Path:
        return self._folder / space


def _fill(index: MemoryIndex, digests: Any, dataset: lance.LanceDataset) -> int:
    """Read what the index says of its rows, and take out those that the table has no more: returns how many."""
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


def _checksum(path: Path) -> list[int]:
    """Length and CRC-32: against damage, not against intent."""
    value, size = 0, 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            value, size = zlib.crc32(part, value), size + len(part)
    return [size, value]
