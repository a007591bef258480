"""One LanceDB table per image space: id, vector, domain, source, time, text.

Several catalogs may write one table (two servers on one lake). ``id`` is the table's primary key, which Lance does not
enforce on plain appends; a merge by it does, also against commits that come in between. So each row is there once.

A search reads a table's vectors, exactly, or goes through the index in memory (:mod:`space_indexes`) where
:mod:`index_maintainer` has found that its recall is enough.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import lance
import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lance.fragment import write_fragments

from core.digests import digest12
from core.errors import StoreError, StoreUnavailable
from serving.catalog.index_files import IndexFiles
from serving.catalog.memory_index import Effort, MemoryIndex
from serving.catalog.queries import Filters, Hit
from serving.catalog.space_indexes import SpaceIndexes
from serving.catalog.table_files import (
    Neighbours,
    has_key,
    merge_files,
    nearest_rows,
    quoted,
    table_of,
    with_key,
    write_out_deletions,
)

log = logging.getLogger("ratchet.catalog")
COMPACT_EVERY = 32
"""Merges between two compactions. Each merge is a fragment; scans of thousands of fragments are slow."""
PREFIX: Final = "clip_"
FRESHNESS: Final = timedelta(seconds=5)
"""How old the version of a table may be that a search reads, where another process writes it."""
METADATA_BYTES: Final = 256 << 20
HIT_COLUMNS: Final = ["id", "text", "domain", "source", "time"]


class Tables:
    """The tables of all image spaces under one URL. Any number of processes; one writing thread in each of them."""

    def __init__(self, url: str, index_folder: Path | None = None) -> None:
        """Args:
        index_folder: on the local disk, where indexes are kept from one start to the next; None: they are not.
        """
        self.url = url
        self._database = lancedb.connect(url, read_consistency_interval=FRESHNESS)
        self._open: dict[str, Any] = {}
        self._merges: dict[str, int] = {}
        own = None if index_folder is None else index_folder / digest12(url.encode())
        self.indexes = SpaceIndexes(self._newest, None if own is None else IndexFiles(own))
        self._session = lance.Session(index_cache_size_bytes=0, metadata_cache_size_bytes=METADATA_BYTES)
        self._readers: dict[str, tuple[lance.LanceDataset, float]] = {}
        """What exact searches read, and until when it is fresh enough. Not LanceDB's tables: those take three times
        the processor time for a query."""

    def spaces(self) -> list[str]:
        """Image spaces that have a table."""
        names = self._database.list_tables()
        named = [name for name in getattr(names, "tables", names) if name.startswith(PREFIX)]
        return sorted(name.removeprefix(PREFIX) for name in named)

    def id_batches(self, space: str) -> Iterator[list[str]]:
        """Ids of all rows of a space in its newest version, some thousand at once; nothing when there is no table."""
        table = self._keyed(space)
        if table is None:
            return
        table.checkout_latest()
        for batch in table.to_lance().to_batches(columns=["id"]):
            yield batch.column("id").to_pylist()

    def present(self, space: str, ids: Collection[str]) -> set[str]:
        """Those of some ids that have a row in the newest version."""
        if (indexed := self.indexes.present(space, ids)) is not None:
            return indexed
        table = self._table(space)
        if table is None:
            return set()
        table.checkout_latest()
        present: set[str] = set()
        for names in quoted(ids):
            present.update(
                table.search().where(f"id IN ({names})").select(["id"]).limit(None).to_arrow()["id"].to_pylist()
            )
        return present

    def merge(self, space: str, rows: pa.Table, vectors: npt.NDArray[np.float32]) -> None:
        """Add those of the rows (id, domain, source, time, text; vectors [n, dim]) whose ids are not there, in one
        atomic commit. Another writer's commit in between is taken into account.
        """
        data = table_of(rows, vectors)
        table = self._keyed(space) or self._create(space, data.schema)
        table.merge_insert("id").when_not_matched_insert_all().execute(data)
        self._merges[space] = self._merges.get(space, 0) + 1
        self._written(space)
        self.indexes.add(space, data)
        if self._merges[space] >= COMPACT_EVERY:
            merge_files(table.to_lance())
            table.checkout_latest()
            self._merges[space] = 0
            self._written(space)

    def search(self, space: str, vector: npt.NDArray[np.float32], k: int, filters: Filters) -> list[Hit]:
        """The ``k`` nearest rows by cosine similarity, best first; equal scores by id. Exact, or through the index,
        whose scores have the precision of its codes.

        Raises:
            StoreError: the space has another dimension.
        """
        usable = self.indexes.usable(space)
        if usable is None:
            return self._search_exactly(space, vector, k, filters)
        return self.with_texts(space, *self.search_index(space, *usable, vector, k, filters))

    def search_index(
        self, space: str, index: MemoryIndex, effort: Effort, vector: npt.NDArray[np.float32], k: int, filters: Filters
    ) -> tuple[list[Hit], list[str]]:
        """The same through an index, however good it is, without a read of the table; and the ids of those hits that
        lack their text.
        """
        _check_dimension(space, index.dimension, vector)
        return index.search(vector, k, filters, effort)

    def with_texts(self, space: str, hits: list[Hit], lacking: Sequence[str]) -> list[Hit]:
        """Hits with the texts of those that lack them, as far as the table can be read."""
        texts = self._texts(space, lacking)
        return [replace(hit, text=texts.get(hit.id, hit.text)) for hit in hits]

    def nearest(self, space: str, vectors: npt.NDArray[np.float32], k: int, filters: Filters) -> list[Neighbours]:
        """The ``k`` nearest rows to each of the vectors [n, dim], exactly."""
        dataset = self._newest(space)
        return [] if dataset is None else nearest_rows(dataset, vectors, k, filters.sql())

    def rows(self, space: str) -> int:
        """Rows of the newest version of a space's table."""
        dataset = self._newest(space)
        return 0 if dataset is None else dataset.count_rows()

    def vectors(self, space: str, ids: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors [n, dim] of these ids, in their order; unknown ids are passed over."""
        table = self._table(space)
        if table is None:
            return np.empty((0, 0), np.float32)
        rows, stored = self._vectors(table, ids)
        place = {each: index for index, each in enumerate(rows)}
        return np.asarray(stored[[place[each] for each in ids if each in place]], np.float32)

    def scores(self, space: str, vector: npt.NDArray[np.float32], ids: Sequence[str]) -> dict[str, float]:
        """Cosine similarity of a query to each of these rows; rows that are not there are passed over."""
        table = self._table(space)
        if table is None or not ids:
            return {}
        rows, stored = self._vectors(table, ids)
        unit = vector / max(float(np.linalg.norm(vector)), 1e-12)
        lengths = np.maximum(np.linalg.norm(stored, axis=1), 1e-12)
        return dict(zip(rows, (stored @ unit / lengths).tolist(), strict=True))

    def remove(self, space: str, ids: Collection[str]) -> None:
        """Take rows out of a space's table. Their bytes go with :meth:`expunge`."""
        table = self._table(space)
        for names in quoted(ids) if table is not None else ():
            table.delete(f"id IN ({names})")
        self._written(space)
        self.indexes.remove(space, ids)

    def expunge(self, space: str, older_than: timedelta) -> None:
        """Rewrite the data files that still hold removed rows, and remove older versions with their files.

        Not LanceDB's optimize: that leaves a file as it is of which less than a tenth was removed.
        """
        table = self._table(space)
        if table is None:
            return
        table.checkout_latest()
        dataset = table.to_lance()
        write_out_deletions(dataset)
        table.checkout_latest()
        self._written(space)
        dataset.cleanup_old_versions(older_than=older_than, error_if_tagged_old_versions=False)

    def fragments(self, space: str) -> int:
        """Data files of a space's table."""
        table = self._table(space)
        return 0 if table is None else int(table.stats()["fragment_stats"]["num_fragments"])

    def drop(self, space: str) -> None:
        """Remove a space's table, if there is one, and its index."""
        self.forget(space)
        self.indexes.forget(space, files=True)
        self._database.drop_table(f"{PREFIX}{space}", ignore_missing=True)

    def forget_others(self, spaces: Collection[str]) -> None:
        """Close the tables of all other spaces, and let go of their indexes."""
        for space in {*self._open, *self._merges}.difference(spaces):
            self.forget(space)
        self.indexes.forget_others(spaces)

    def forget(self, space: str) -> None:
        """Close a space's table: the next call opens what is there by then."""
        self._open.pop(space, None)
        self._merges.pop(space, None)
        self._readers.pop(space, None)
        self.indexes.forget(space)

    def _search_exactly(self, space: str, vector: npt.NDArray[np.float32], k: int, filters: Filters) -> list[Hit]:
        dataset = self._reader(space)
        if dataset is None:
            return []
        _check_dimension(space, dataset.schema.field("vector").type.list_size, vector)
        nearest = {"column": "vector", "q": vector, "k": k, "metric": "cosine", "use_index": False}
        rows = dataset.to_table(
            columns=[*HIT_COLUMNS, "_distance"], nearest=nearest, filter=filters.sql() or None, prefilter=True
        )
        hits = {
            row["id"]: Hit(row["id"], 1.0 - float(row["_distance"]), row["text"] or "", row["domain"] or "",
                           row["source"] or "", row["time"])
            for row in rows.to_pylist()
        }  # fmt: skip
        return sorted(hits.values(), key=lambda hit: (-hit.score, hit.id))

    def _texts(self, space: str, ids: Sequence[str]) -> dict[str, str]:
        texts: dict[str, str] = {}
        try:
            for names in quoted(ids):
                if (dataset := self._reader(space)) is not None:
                    rows = dataset.to_table(columns=["id", "text"], filter=f"id IN ({names})")
                    texts |= zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True)
        except (OSError, RuntimeError, ValueError) as error:  # hits without their texts are better than none
            log.warning("long texts of image space %s cannot be read: %s", space, error)
        return texts

    def _newest(self, space: str) -> lance.LanceDataset | None:
        """The newest version of a space's table, opened for this call alone: threads share no version."""
        table = self._table(space)
        return None if table is None else lance.dataset(self._address(space), session=self._session)

    def _reader(self, space: str) -> lance.LanceDataset | None:
        """A space's table as searches read it: at most :data:`FRESHNESS` old, and after own writes the newest one."""
        known = self._readers.get(space)
        if known is not None and time.monotonic() < known[1]:
            return known[0]
        if known is None:
            if (dataset := self._newest(space)) is None:
                return None
        else:
            dataset, latest = known[0], known[0].latest_version
            dataset = dataset if latest == dataset.version else dataset.checkout_version(latest)
        self._readers[space] = dataset, time.monotonic() + FRESHNESS.total_seconds()
        return dataset

    def _written(self, space: str) -> None:
        if (known := self._readers.get(space)) is not None:
            self._readers[space] = known[0], 0.0

    def _vectors(self, table: Any, ids: Sequence[str]) -> tuple[list[str], npt.NDArray[np.float32]]:
        """Ids and vectors [n, dim] of those that are there, in any order."""
        dimension = table.schema.field("vector").type.list_size
        names: list[str] = []
        parts = [np.empty((0, dimension), np.float32)]
        for condition in quoted(ids):
            rows = table.search().where(f"id IN ({condition})").select(["id", "vector"]).limit(None).to_arrow()
            names += rows["id"].to_pylist()
            parts.append(rows["vector"].combine_chunks().flatten().to_numpy().reshape(len(rows), dimension))
        return names, np.concatenate(parts)

    def _table(self, space: str) -> Any:
        if not space.isalnum():
            raise StoreError(f"{space!r} is no name of an image space.", "Report this.")
        if space not in self._open and space in self.spaces():
            with contextlib.suppress(ValueError, FileNotFoundError):  # another process makes or drops it right now
                self._open[space] = self._database.open_table(f"{PREFIX}{space}")
        return self._open.get(space)

    def _keyed(self, space: str) -> Any:
        """The table, with its primary key: one of an older version is written anew."""
        table = self._table(space)
        if table is not None and not has_key(table.schema):
            table = self._open[space] = self._rewrite(space, table)
        return table

    def _create(self, space: str, schema: pa.Schema) -> Any:
        """The table, made where there is none. Of two that make it at once one does, and the other takes it.

        Not LanceDB's create_table: that one, when it loses the race, overwrites the winner's table. With no retries the
        commit writes version 1 or fails.
        """
        failure: Exception | None = None
        try:
            lance.LanceDataset.commit(self._address(space), lance.LanceOperation.Overwrite(schema, []), max_retries=0)
        except OSError as error:
            failure = error
        table = self._keyed(space)
        if table is None:
            raise StoreUnavailable(f"the table of image space {space} cannot be made: {failure}.", "It is tried again.")
        return table

    def _rewrite(self, space: str, table: Any) -> Any:
        """Give a table of an older version its primary key; rows that two writers both added become one."""
        data = table.to_arrow()
        first = {sample: index for index, sample in reversed(list(enumerate(data["id"].to_pylist())))}
        unique = data.take(sorted(first.values())).cast(with_key(data.schema))
        address, version = self._address(space), table.version
        operation = lance.LanceOperation.Overwrite(unique.schema, write_fragments(unique, address, mode="overwrite"))
        try:
            lance.LanceDataset.commit(address, operation, read_version=version, max_retries=0)
        except OSError as error:  # another process wrote meanwhile, and this may be the same
            raise StoreUnavailable(
                f"the table of image space {space} changed: {error}", "It is tried again."
            ) from error
        return self._database.open_table(f"{PREFIX}{space}")

    def _address(self, space: str) -> str:
        return f"{self.url}/{PREFIX}{space}.lance"


def _check_dimension(space: str, dimension: int, vector: npt.NDArray[np.float32]) -> None:
    if dimension != len(vector):
        raise StoreError(f"the index of {space} has another dimension than the query.", "Report this.")
