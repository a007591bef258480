"""One Lance table per image space: id, vector, domain, source, time, text, and the labels that filters need. Several
servers on one lake may write one table. Lance does not enforce the primary key ``id`` on plain appends, but merges by
it do, even against concurrent commits. Searches are exact, or use the index in memory (:mod:`space_indexes`) once its
recall is sufficient."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import fsspec
import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from core.digests import digest12
from core.errors import StoreError, StoreUnavailable
from serving.catalog.index_files import IndexFiles
from serving.catalog.memory_index import Effort, MemoryIndex
from serving.catalog.queries import Filters, Hit
from serving.catalog.row_columns import BATCH_ROWS, LABELS, Keys, Vectors, digests_of, keys_of, unit_rows, vectors_of
from serving.catalog.space_indexes import SpaceIndexes
from streams.store.conditions import is_in
from streams.store.sample_store import ADDRESS, SampleStore

log = logging.getLogger("ratchet.catalog")
OPENING_TRIES: Final = 40
OPENING_PAUSE: Final = 0.05
"""Seconds between tries: a table whose folder exists has two seconds to get its first version."""
COMPACT_EVERY = 32
"""Merges between compactions. Each merge is a fragment, and scans of thousands of fragments are slow."""
PREFIX: Final = "clip_"
SUFFIX: Final = ".lance"
FRESHNESS: Final = timedelta(seconds=5)
"""Greatest age of the table version that searches read, if other processes write it."""
METADATA_BYTES: Final = 256 << 20
IDS_AT_ONCE: Final = 500
HIT_COLUMNS: Final = ["id", "text", "domain", "source", "time"]
LEAST_NORM: Final = 1e-12
_PRIMARY_KEY: Final = {"lance-schema:unenforced-primary-key": "true"}


@dataclass(frozen=True, slots=True)
class Neighbours:
    scores: Vectors
    """Cosine similarities [k]."""
    keys: Keys
    """See :func:`serving.catalog.row_columns.keys_of`."""


class Tables:
    """The tables of all image spaces under one URL. Any number of processes, each with one writing thread."""

    def __init__(self, url: str, index_folder: Path) -> None:
        """``index_folder``: on the local disk; indexes are kept there between starts."""
        self.url = url
        self._merges: dict[str, int] = {}
        self._seen: set[str] = set()
        self.indexes = SpaceIndexes(self._indexable, IndexFiles(index_folder / digest12(url.encode())))
        self._session = lance.Session(index_cache_size_bytes=0, metadata_cache_size_bytes=METADATA_BYTES)
        self._readers: dict[str, tuple[lance.LanceDataset, float]] = {}
        """The version that searches read, and the time until which it is fresh."""

    def spaces(self) -> list[str]:
        files, root = fsspec.core.url_to_fs(self.url)
        files.invalidate_cache(root)
        try:
            names = [str(path).rstrip("/").rpartition("/")[2] for path in files.ls(root, detail=False)]
        except FileNotFoundError:
            return []
        tables = [name for name in names if name.startswith(PREFIX) and name.endswith(SUFFIX)]
        return sorted(name.removeprefix(PREFIX).removesuffix(SUFFIX) for name in tables)

    def id_batches(self, space: str) -> Iterator[list[str]]:
        """Row IDs of a space's newest version, in batches of some thousand; nothing without a table."""
        if (dataset := self._newest(space)) is not None:
            for batch in dataset.to_batches(columns=["id"]):
                yield batch.column("id").to_pylist()

    def present(self, space: str, ids: Collection[str]) -> set[str]:
        """Those of ``ids`` that have a row in the newest version."""
        if (indexed := self.indexes.present(space, ids)) is not None:
            return indexed
        return set(_rows_of(self._newest(space), ids, ["id"])["id"].to_pylist())

    def upgrade(self, space: str, corpus: SampleStore) -> None:
        """Give a table of an earlier version the columns of :data:`LABELS`, filled from the corpus in one commit. Rows
        that a server of that version adds later are removed at the next call, to be embedded again. Raises OSError if
        another process changes the table meanwhile."""
        dataset = self._newest(space)
        if dataset is None:
            return
        if not _has_labels(dataset):
            log.info("the table of image space %s gets the columns %s", space, ", ".join(LABELS))
            rows = corpus.scan(columns=["id", *LABELS], having="text")
            once = rows.append_column("row", pa.array(range(rows.num_rows), pa.int64())).group_by("id")
            dataset.merge(_without_nulls(rows.take(once.aggregate([("row", "min")])["row_min"])), "id")
        if unknown := dataset.to_table(columns=["id"], filter="label IS NULL")["id"].to_pylist():
            self.remove(space, unknown)
        self._written(space)

    def merge(self, space: str, rows: pa.Table, vectors: Vectors) -> None:
        """Add rows (id, domain, source, time, text, concept, label, tags; vectors [n, dim]) with new IDs in one commit;
        safe with other writers."""
        data = table_of(rows, vectors)
        dataset = self._newest(space)
        if dataset is None:
            dataset = self._create(space, data.schema)
        dataset.merge_insert("id").when_not_matched_insert_all().execute(data)
        self._merges[space] = self._merges.get(space, 0) + 1
        self._written(space)
        self.indexes.add(space, data)
        if self._merges[space] >= COMPACT_EVERY:
            dataset.optimize.compact_files(target_rows_per_fragment=65_536)
            self._merges[space] = 0
            self._written(space)

    def search(self, space: str, vectors: Vectors, k: int, filters: Filters) -> list[list[Hit]]:
        """The ``k`` nearest rows to each of the vectors [n, dim] by cosine similarity, best first; ties by ID. Exact,
        or with scores at the precision of the index's codes. Raises StoreError when the space has another dimension."""
        usable = self.indexes.usable(space)
        if usable is None:
            return self._search_exactly(space, vectors, k, filters)
        return self.with_texts(space, *self.search_index(space, *usable, vectors, k, filters))

    def search_index(
        self, space: str, index: MemoryIndex, effort: Effort, vectors: Vectors, k: int, filters: Filters
    ) -> tuple[list[list[Hit]], list[str]]:
        """Search an index whatever its recall, without the table. Also returns the IDs of hits without their text."""
        _check_dimension(space, index.dimension, vectors)
        return index.search(vectors, k, filters, effort)

    def with_texts(self, space: str, found: list[list[Hit]], lacking: Sequence[str]) -> list[list[Hit]]:
        """Add missing texts to hits, if the table can be read."""
        if not lacking:
            return found
        try:
            rows = _rows_of(self._reader(space), lacking, ["id", "text"])
        except (OSError, RuntimeError, ValueError) as error:  # hits without texts are better than no hits
            log.warning("long texts of image space %s cannot be read: %s", space, error)
            return found
        texts = dict(zip(rows["id"].to_pylist(), rows["text"].to_pylist(), strict=True))
        return [[replace(hit, text=texts.get(hit.id, hit.text)) for hit in hits] for hits in found]

    def nearest(self, space: str, vectors: Vectors, k: int, filters: Filters) -> list[Neighbours]:
        """The exact ``k`` nearest rows to each of the vectors [n, dim] in the newest version."""
        dataset = self._newest(space) if len(vectors) else None
        if dataset is None:
            return []
        found = _nearest(dataset, vectors, k, filters)
        return [
            Neighbours(np.array([hit.score for hit in hits], np.float32), keys_of(digests_of([hit.id for hit in hits])))
            for hits in found
        ]

    def rows(self, space: str) -> int:
        """Rows of the newest version; 0 if there is no table, or it is gone."""
        try:
            dataset = self._newest(space)
        except (ValueError, FileNotFoundError):
            if space in self.spaces():
                raise
            return 0
        return 0 if dataset is None else dataset.count_rows()

    def vectors(self, space: str, ids: Sequence[str]) -> dict[str, Vectors]:
        """Unit vectors [dim] by ID, in the order of ``ids``; unknown IDs are skipped."""
        rows = _rows_of(self._newest(space) if ids else None, ids, ["id", "vector"])
        if not rows.num_rows:
            return {}
        known = dict(zip(rows["id"].to_pylist(), unit_rows(vectors_of(rows)), strict=True))
        return {each: known[each] for each in ids if each in known}

    def remove(self, space: str, ids: Collection[str]) -> None:
        """Remove rows from a space's table. :meth:`expunge` removes their bytes."""
        if (dataset := self._newest(space)) is not None:
            for condition in _conditions(ids):
                dataset.delete(condition)
        self._written(space)
        self.indexes.remove(space, ids)

    def expunge(self, space: str, older_than: timedelta) -> None:
        """Rewrite data files that contain removed rows, and delete older versions with their files."""
        dataset = self._newest(space)
        if dataset is None:
            return
        clean = [each.fragment_id for each in dataset.get_fragments() if not each.num_deletions]
        dataset.optimize.compact_files(
            target_rows_per_fragment=1, materialize_deletions=True, materialize_deletions_threshold=0.0,
            excluded_fragment_ids=clean,
        )  # fmt: skip
        self._written(space)
        dataset.cleanup_old_versions(older_than=older_than, error_if_tagged_old_versions=False)

    def fragments(self, space: str) -> int:
        dataset = self._newest(space)
        return 0 if dataset is None else len(dataset.get_fragments())

    def drop(self, space: str) -> None:
        """Remove a space's table and its index, if they exist."""
        self.forget(space)
        self.indexes.forget(space, files=True)
        lance.LanceDataset.drop(self._address(space), ignore_not_found=True)

    def forget_others(self, spaces: Collection[str]) -> None:
        for space in self._seen.difference(spaces):
            self.forget(space)
        self.indexes.forget_others(spaces)

    def forget(self, space: str) -> None:
        """Close a space's table; the next call opens it again."""
        self._seen.discard(space)
        self._merges.pop(space, None)
        self._readers.pop(space, None)
        self.indexes.forget(space)

    def _search_exactly(self, space: str, vectors: Vectors, k: int, filters: Filters) -> list[list[Hit]]:
        dataset = self._reader(space)
        if dataset is None:
            return [[] for _ in vectors]
        _check_dimension(space, dataset.schema.field("vector").type.list_size, vectors)
        return _nearest(dataset, vectors, k, filters)

    def _indexable(self, space: str) -> lance.LanceDataset | None:
        """The newest version of a space's table, once it has all columns."""
        dataset = self._newest(space)
        return dataset if dataset is not None and _has_labels(dataset) else None

    def _newest(self, space: str) -> lance.LanceDataset | None:
        """The newest version of a space's table, opened for this call: threads share no version. None if there is none
        yet; a table dropped by another process raises until :meth:`forget`."""
        listed = False
        for left in reversed(range(OPENING_TRIES)):
            try:
                dataset = lance.dataset(self._address(space), session=self._session)
                break
            except (ValueError, FileNotFoundError):
                if space in self._seen or not left:
                    raise
                listed = listed or space in self.spaces()
                if not listed:
                    return None
            time.sleep(OPENING_PAUSE)  # another process is making it: the folder exists before the first version
        self._seen.add(space)
        return dataset

    def _reader(self, space: str) -> lance.LanceDataset | None:
        """A space's table for searches: at most :data:`FRESHNESS` old, the newest after own writes."""
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

    def _create(self, space: str, schema: pa.Schema) -> lance.LanceDataset:
        """Make the table if it is missing. Without retries the commit writes version 1 or fails, so of concurrent
        writers one makes the table and the others use it."""
        failure: Exception | None = None
        try:
            lance.LanceDataset.commit(self._address(space), lance.LanceOperation.Overwrite(schema, []), max_retries=0)
        except OSError as error:
            failure = error
        dataset = self._newest(space)
        if dataset is None:
            raise StoreUnavailable(f"the table of image space {space} cannot be made: {failure}.", "It is tried again.")
        return dataset

    def _address(self, space: str) -> str:
        if not space.isalnum():
            raise StoreError(f"{space!r} is not the name of an image space.", "Report this.")
        return f"{self.url}/{PREFIX}{space}{SUFFIX}"


def table_of(rows: pa.Table, vectors: Vectors) -> pa.Table:
    """Rows (id, domain, source, time, text, concept, label, tags) and vectors [n, dim] in the table's schema."""
    vector = pa.list_(pa.float32(), vectors.shape[1])
    schema = pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=_PRIMARY_KEY),
            pa.field("vector", vector),
            pa.field("domain", pa.string()),
            pa.field("source", pa.string()),
            pa.field("time", pa.timestamp("us", tz="UTC")),
            pa.field("text", pa.string()),
            pa.field("concept", pa.string()),
            pa.field("label", pa.string()),
            pa.field("tags", pa.list_(pa.string())),
        ]
    )
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), type=vector)
    fields = _without_nulls(rows.select([*HIT_COLUMNS, *LABELS]))
    return fields.append_column("vector", column).select(schema.names).cast(schema)


def _without_nulls(rows: pa.Table) -> pa.Table:
    """Rows with empty labels instead of null: null says that a server of an earlier version wrote the row."""
    for name in LABELS:
        kind = pa.list_(pa.string()) if name == "tags" else pa.string()
        column = rows[name].cast(kind).combine_chunks()
        nothing = pa.scalar([] if name == "tags" else "", kind)
        rows = rows.set_column(rows.schema.get_field_index(name), name, pc.coalesce(column, nothing))
    return rows


def _has_labels(dataset: lance.LanceDataset) -> bool:
    return set(LABELS) <= set(dataset.schema.names)


def _nearest(dataset: lance.LanceDataset, vectors: Vectors, k: int, filters: Filters) -> list[list[Hit]]:
    """The exact ``k`` nearest rows to each of the vectors [n, dim], in one pass over the table in batches. The order in
    the table decides which of the last rows of equal scores are found, so a version of it always gives the same."""
    unit = unit_rows(vectors)
    best, places = np.empty((len(unit), 0), np.float32), np.empty((len(unit), 0), np.int64)
    condition = filters.sql() or None
    for batch in dataset.to_batches(columns=["vector"], filter=condition, batch_size=BATCH_ROWS, with_row_address=True):
        rows = vectors_of(batch)
        norms = np.sqrt(np.einsum("nd,nd->n", rows, rows))
        with np.errstate(invalid="ignore", over="ignore"):
            scores = np.nan_to_num(unit @ rows.T / np.maximum(norms, LEAST_NORM), posinf=0.0, neginf=0.0)
        addresses = batch.column(ADDRESS).to_numpy().astype(np.int64)
        scores = np.concatenate([best, scores], axis=1)
        places = np.concatenate([places, np.broadcast_to(addresses, (len(unit), len(addresses)))], axis=1)
        if scores.shape[1] > k:
            order = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            scores, places = np.take_along_axis(scores, order, 1), np.take_along_axis(places, order, 1)
        best = scores
    wanted = np.unique(places)
    if not len(wanted):
        return [[] for _ in unit]
    where = is_in(ADDRESS, map(str, wanted.tolist()))
    rows = dataset.to_table(columns=HIT_COLUMNS, filter=where, with_row_address=True)
    known = {row[ADDRESS]: row for row in rows.to_pylist()}
    found = []
    for pair in zip(places.tolist(), best.tolist(), strict=True):
        hits = {hit.id: hit for place, score in zip(*pair, strict=True) if (hit := _hit(known[place], score))}
        found.append(sorted(hits.values(), key=lambda hit: (-hit.score, hit.id)))
    return found


def _hit(row: dict[str, Any], score: float) -> Hit:
    return Hit(row["id"], score, row["text"] or "", row["domain"] or "", row["source"] or "", row["time"])


def _rows_of(dataset: lance.LanceDataset | None, ids: Collection[str], columns: list[str]) -> pa.Table:
    if dataset is None or not ids:
        return pa.table({name: pa.nulls(0) for name in columns})
    return pa.concat_tables(dataset.to_table(columns=columns, filter=condition) for condition in _conditions(ids))


def _conditions(ids: Collection[str]) -> Iterator[str]:
    """SQL conditions for the IDs, :data:`IDS_AT_ONCE` in each."""
    wanted = sorted(each for each in ids if each.isalnum())
    for start in range(0, len(wanted), IDS_AT_ONCE):
        yield f"id IN ({', '.join(repr(each) for each in wanted[start : start + IDS_AT_ONCE])})"


def _check_dimension(space: str, dimension: int, vectors: Vectors) -> None:
    if dimension != vectors.shape[1]:
        raise StoreError(f"the index of {space} has another dimension than the query.", "Report this.")
