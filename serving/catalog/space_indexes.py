"""The indexes of the resident spaces, kept equal to their tables.

A row that this process merges is added right after its commit. What others commit is found by the data files that were
not there before; what they remove, by the number of rows.
"""

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
    """One space's index, and what it was brought up to."""

    def __init__(self) -> None:
        self.writing = threading.RLock()
        """Held to change the index, or to exchange it. Searches do not take it."""
        self.index: MemoryIndex | None = None
        self.effort: Effort | None = None
        """Of searches of clients; None: they search exactly."""
        self.built_rows = 0
        """Rows that it was trained for."""
        self.version = -1
        self.files: set[int] = set()
        """Data files that were read."""
        self.looked_on_disk = False
        self.saved_rows = -1
        """Rows of the index that is kept on the disk; -1: none is."""


class SpaceIndexes:
    """One index for each space that has one. Any thread."""

    def __init__(self, newest: Callable[[str], lance.LanceDataset | None], files: IndexFiles) -> None:
        """``newest``: the newest version of a space's table."""
        self._newest = newest
        self._files = files
        self._spaces: dict[str, SpaceIndex] = {}
        self._changing = threading.Lock()

    def of(self, space: str) -> SpaceIndex:
        """Of one space, with an index or without."""
        with self._changing:
            return self._spaces.setdefault(space, SpaceIndex())

    def usable(self, space: str) -> tuple[MemoryIndex, Effort] | None:
        """The index and effort that clients search with; None: they search exactly."""
        known = self._spaces.get(space)
        if known is None or (index := known.index) is None or (effort := known.effort) is None:
            return None
        return index, effort

    def bytes(self) -> int:
        return sum(each.index.bytes for each in list(self._spaces.values()) if each.index is not None)

    def build(self, space: str, most_bytes: float) -> None:
        """Make a space's index. Until it is complete, searches and changes go to the old one.

        Raises:
            IndexTooLarge: it does not fit into so many bytes.
        """
        dataset = self._newest(space)
        if dataset is None:
            return
        index = build_index(dataset, most_bytes)
        self._exchange(space, index, dataset.count_rows())
        self._forget_files(space)

    def load(self, space: str) -> bool:
        """Take the index that was kept on the disk, at the first call. False when there is none."""
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
        """Keep the index on the disk. Raises OSError."""
        known = self.of(space)
        with known.writing:
            if known.index is not None:
                self._files.save(space, known.index, known.built_rows)
                known.saved_rows = known.index.rows

    def follow(self, space: str) -> None:
        """Bring a space's index up to its table."""
        known = self.of(space)
        with known.writing:
            index = known.index
            dataset = self._newest(space) if index is not None else None
            if index is not None and dataset is not None and self._bring_up(known, index, dataset):
                self._forget_files(space)

    def add(self, space: str, rows: pa.Table) -> None:
        """Rows (in the table's schema) that were committed."""
        self._change(space, lambda index: index.add(rows))

    def remove(self, space: str, ids: Collection[str]) -> None:
        """Rows that were removed from the table. The index that is kept on the disk goes: it holds them."""
        if ids:
            self._change(space, lambda index: index.remove(keys_of(digests_of(sorted(ids)))))
            self._forget_files(space)

    def present(self, space: str, ids: Collection[str]) -> set[str] | None:
        """Those of some ids that are in the table by now; None where there is no index that knows."""
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
        """Let go of an index, of that on the disk too with ``files``."""
        with self._changing:
            self._spaces.pop(space, None)
        if files:
            self._forget_files(space)

    def forget_others(self, spaces: Collection[str]) -> None:
        """Let go of the indexes of all other spaces."""
        for space in set(self._spaces).difference(spaces):
            self.forget(space)
        self._files.remove_others(set(spaces))

    def _change(self, space: str, change: Callable[[MemoryIndex], object]) -> None:
        """What the table has must not fail here: an index that cannot be changed is given up, and made again."""
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
        """Put an index in place of the old one, brought up to what was committed since it was read."""
        known = self.of(space)
        fresh = SpaceIndex()
        for last in (False, True):  # most of it before others wait
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
        """Returns how many rows were taken out."""
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
    """Take out what the table has no more, and add what was overlooked. Returns how many rows were taken out."""
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
