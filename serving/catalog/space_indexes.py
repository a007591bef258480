"""The indexes of the resident spaces, kept equal to their tables. Rows merged by this process are added right after the
commit. Other processes' additions are found by new data files, their removals by the number of rows."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Collection

import lance
import numpy as np
import pyarrow as pa

from serving.catalog.index_files import COLUMNS, IndexFiles, build_index
from serving.catalog.memory_index import Effort, MemoryIndex
from serving.catalog.row_columns import BATCH_ROWS, Keys, digests_of, keys_of

log = logging.getLogger("ratchet.catalog")


class SpaceIndex:
    """One space's index, and the table state that it reflects."""

    def __init__(self) -> None:
        self.writing = threading.RLock()
        """Held to change or replace the index. Searches do not take it."""
        self.index: MemoryIndex | None = None
        self.effort: Effort | None = None
        """Effort for client searches; None: they search exactly."""
        self.built_rows = 0
        self.version = -1
        self.files: set[int] = set()
        self.looked_on_disk = False
        self.saved_rows = -1
        """Rows of the index on disk; -1: there is none."""


class SpaceIndexes:
    def __init__(self, newest: Callable[[str], lance.LanceDataset | None], files: IndexFiles) -> None:
        """``newest``: returns the newest version of a space's table."""
        self._newest = newest
        self._files = files
        self._spaces: dict[str, SpaceIndex] = {}
        self._changing = threading.Lock()

    def of(self, space: str) -> SpaceIndex:
        with self._changing:
            return self._spaces.setdefault(space, SpaceIndex())

    def usable(self, space: str) -> tuple[MemoryIndex, Effort] | None:
        """Index and effort for client searches; None: they search exactly."""
        known = self._spaces.get(space)
        if known is None or (index := known.index) is None or (effort := known.effort) is None:
            return None
        return index, effort

    def bytes(self) -> int:
        return sum(each.index.bytes for each in list(self._spaces.values()) if each.index is not None)

    def build(self, space: str, most_bytes: float) -> None:
        """Build a space's index; the old one is kept current until then. Raises IndexTooLarge above ``most_bytes``."""
        dataset = self._newest(space)
        if dataset is None:
            return
        index = build_index(dataset, most_bytes)
        self._exchange(space, index, dataset.count_rows())
        self._forget_files(space)

    def load(self, space: str) -> bool:
        """Load the index kept on disk, at the first call only. False if there is none."""
        known = self.of(space)
        if known.looked_on_disk or (dataset := self._newest(space)) is None:
            return False
        known.looked_on_disk = True
        if (loaded := self._files.load(space, dataset)) is None:
            return False
        index, built_rows = loaded
        rows = index.rows
        self._exchange(space, index, built_rows)
        with known.writing:
            known.saved_rows = rows if self._files.exist(space) else -1
        return True

    def save(self, space: str) -> None:
        """Write the index to disk. Raises OSError."""
        known = self.of(space)
        with known.writing:
            if known.index is not None:
                self._files.save(space, known.index, known.built_rows)
                known.saved_rows = known.index.rows

    def follow(self, space: str) -> None:
        known = self.of(space)
        with known.writing:
            index = known.index
            dataset = self._newest(space) if index is not None else None
            if index is not None and dataset is not None and self._bring_up(known, index, dataset):
                self._forget_files(space)

    def add(self, space: str, rows: pa.Table) -> None:
        self._change(space, lambda index: index.add(rows))

    def remove(self, space: str, ids: Collection[str]) -> None:
        """Remove rows that left the table, and the index on disk, which still contains them."""
        if ids:
            self._change(space, lambda index: index.remove(keys_of(digests_of(sorted(ids)))))
            self._forget_files(space)

    def present(self, space: str, ids: Collection[str]) -> set[str] | None:
        """Those of ``ids`` that are in the table now; None without an index."""
        known = self._spaces.get(space)
        index = None if known is None else known.index
        if known is None or index is None:
            return None
        self.follow(space)
        with known.writing:
            index = known.index or index
            names = sorted(ids)
            here = index.contains(keys_of(digests_of(names)))
            return {name for name, is_here in zip(names, here.tolist(), strict=True) if is_here}

    def forget(self, space: str, files: bool = False) -> None:
        """Drop a space's index; with ``files`` also the one on disk."""
        with self._changing:
            self._spaces.pop(space, None)
        if files:
            self._forget_files(space)

    def forget_others(self, spaces: Collection[str]) -> None:
        for space in set(self._spaces).difference(spaces):
            self.forget(space)
        self._files.remove_others(set(spaces))

    def _change(self, space: str, change: Callable[[MemoryIndex], object]) -> None:
        """Change an index without raising: the table is already changed, so an index that fails is rebuilt."""
        known = self._spaces.get(space)
        if known is None:
            return
        with known.writing:
            try:
                if known.index is not None:
                    change(known.index)
            except Exception:
                log.exception("the index of image space %s is made again: it could not be changed", space)
                known.index = None
                self._forget_files(space)

    def _forget_files(self, space: str) -> None:
        known = self.of(space)
        with known.writing:
            self._files.remove(space)
            known.saved_rows = -1

    def _exchange(self, space: str, index: MemoryIndex, built_rows: int) -> None:
        """Replace an index, after adding what was committed since it was read."""
        known = self.of(space)
        fresh = SpaceIndex()
        for last in (False, True):  # most of the work happens before the lock is taken
            with known.writing if last else contextlib.nullcontext():
                dataset = self._newest(space)
                if dataset is None:
                    return
                if self._bring_up(fresh, index, dataset):
                    self._forget_files(space)
                if last:
                    known.index, known.built_rows = index, built_rows
                    known.version, known.files = fresh.version, fresh.files

    def _bring_up(self, known: SpaceIndex, index: MemoryIndex, dataset: lance.LanceDataset) -> int:
        """Bring an index up to a dataset; returns the number of rows removed."""
        if dataset.version == known.version:
            return 0
        files = {each.fragment_id: each for each in dataset.get_fragments()}
        for number, file in files.items():
            if number not in known.files and not index.contains(_keys(file)).all():
                _add(index, file)
        removed = _equalize(index, dataset) if dataset.count_rows() != index.rows else 0
        known.version, known.files = dataset.version, set(files)
        return removed


def _equalize(index: MemoryIndex, dataset: lance.LanceDataset) -> int:
    """Remove rows that the table no longer has and add missing ones; returns the number removed."""
    stored = _keys(dataset)
    columns = index.columns
    held = keys_of(columns.digests()[columns.live()])
    removed = held[~np.isin(held, stored)]
    if len(removed):
        log.info("%d rows leave an index: the table has them no more", len(removed))
        index.remove(removed)
    if not index.contains(stored).all():
        _add(index, dataset)
    return len(removed)


def _keys(rows: lance.LanceDataset | lance.LanceFragment) -> Keys:
    parts = [keys_of(digests_of(batch.column("id"))) for batch in rows.to_batches(columns=["id"])]
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def _add(index: MemoryIndex, rows: lance.LanceDataset | lance.LanceFragment) -> None:
    for batch in rows.to_batches(columns=COLUMNS, batch_size=BATCH_ROWS):
        index.add(batch)
