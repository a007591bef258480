"""One LanceDB table per image space: id, vector, domain, source, time, text.

Several catalogs may write one table (two servers on one lake). ``id`` is the table's primary key, which Lance does not
enforce on plain appends; a merge by it does, also against commits that come in between. So each row is there once.

The search is exact (flat): at up to some 100 000 rows it answers in milliseconds, and it is the oracle that an
approximate index would be measured against.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from datetime import timedelta
from typing import Any, Final

import lance
import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from lance.fragment import write_fragments

from ops.errors import StoreError, StoreUnavailable
from serving.catalog.queries import Filters, Hit

IDS_AT_ONCE = 500
COMPACT_EVERY = 32
"""Appends between two compactions. Each append is a fragment; scans of thousands of fragments are slow."""


PREFIX: Final = "clip_"
PRIMARY_KEY: Final = {"lance-schema:unenforced-primary-key": "true"}
FRESHNESS: Final = timedelta(seconds=5)
"""How old the version of a table may be that a search reads, where another process writes it."""


class Tables:
    """The tables of all image spaces under one URL. Any number of processes; one writing thread in each of them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._database = lancedb.connect(url, read_consistency_interval=FRESHNESS)
        self._open: dict[str, Any] = {}
        self._appends: dict[str, int] = {}

    def spaces(self) -> list[str]:
        """Image spaces that have a table."""
        names = self._database.list_tables()
        named = [name for name in getattr(names, "tables", names) if name.startswith(PREFIX)]
        return sorted(name.removeprefix(PREFIX) for name in named)

    def ids(self, space: str) -> set[str]:
        """Ids of all rows of a space in its newest version; empty when there is no table."""
        table = self._keyed(space)
        if table is None:
            return set()
        table.checkout_latest()
        return set(table.search().select(["id"]).limit(None).to_arrow()["id"].to_pylist())

    def present(self, space: str, ids: Collection[str]) -> set[str]:
        """Those of some ids that have a row in the newest version."""
        table = self._table(space)
        if table is None:
            return set()
        table.checkout_latest()
        present: set[str] = set()
        for names in _quoted(ids):
            present.update(
                table.search().where(f"id IN ({names})").select(["id"]).limit(None).to_arrow()["id"].to_pylist()
            )
        return present

    def merge(self, space: str, rows: pa.Table, vectors: npt.NDArray[np.float32]) -> None:
        """Add those of the rows (id, domain, source, time, text; vectors [n, dim]) whose ids are not there, in one
        atomic commit. Another writer's commit in between is taken into account.
        """
        data = _table_of(rows, vectors)
        table = self._keyed(space) or self._create(space, data.schema)
        table.merge_insert("id").when_not_matched_insert_all().execute(data)
        self._appends[space] = self._appends.get(space, 0) + 1
        if self._appends[space] % COMPACT_EVERY == 0:
            table.optimize()

    def search(self, space: str, vector: npt.NDArray[np.float32], k: int, filters: Filters) -> list[Hit]:
        """The ``k`` nearest rows by cosine similarity, best first; equal scores by id.

        Raises:
            StoreError: the space has another dimension.
        """
        query = self._nearest(space, vector, k)
        if query is None:
            return []
        if condition := filters.sql():
            query = query.where(condition, prefilter=True)
        found = query.to_list()
        hits = {
            row["id"]: Hit(row["id"], 1.0 - float(row["_distance"]), row["text"] or "", row["domain"] or "",
                           row["source"] or "", row["time"])
            for row in found
        }  # fmt: skip
        return sorted(hits.values(), key=lambda hit: (-hit.score, hit.id))

    def exact_scores(self, space: str, vector: npt.NDArray[np.float32], k: int) -> list[float]:
        """Cosine similarities of the ``k`` nearest rows, best first, whatever index there is."""
        query = self._nearest(space, vector, k)
        rows = [] if query is None else query.bypass_vector_index().to_list()
        return sorted((1.0 - float(row["_distance"]) for row in rows), reverse=True)

    def vectors(self, space: str, ids: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors [n, dim] of these ids, in their order; unknown ids are passed over."""
        table = self._table(space)
        if table is None:
            return np.empty((0, 0), np.float32)
        wanted = ", ".join(f"'{each}'" for each in ids if each.isalnum())
        rows = table.search().where(f"id IN ({wanted})").select(["id", "vector"]).limit(None).to_arrow()
        column = rows["vector"].combine_chunks()
        found = column.flatten().to_numpy().reshape(len(rows), -1)
        place = {each: index for index, each in enumerate(rows["id"].to_pylist())}
        return np.asarray(found[[place[each] for each in ids if each in place]], np.float32)

    def remove(self, space: str, ids: Collection[str]) -> None:
        """Take rows out of a space's table. Their bytes go with :meth:`expunge`."""
        table = self._table(space)
        for names in _quoted(ids) if table is not None else ():
            table.delete(f"id IN ({names})")

    def expunge(self, space: str, older_than: timedelta) -> None:
        """Rewrite the data files that still hold removed rows, and remove older versions with their files.

        Not LanceDB's optimize: that leaves a file as it is of which less than a tenth was removed.
        """
        table = self._table(space)
        if table is None:
            return
        dataset = table.to_lance()
        dataset.optimize.compact_files(materialize_deletions=True, materialize_deletions_threshold=0.0)
        table.checkout_latest()
        dataset.cleanup_old_versions(older_than=older_than, error_if_tagged_old_versions=False)

    def fragments(self, space: str) -> int:
        """Data files of a space's table."""
        table = self._table(space)
        return 0 if table is None else int(table.stats()["fragment_stats"]["num_fragments"])

    def drop(self, space: str) -> None:
        """Remove a space's table, if there is one."""
        self.forget(space)
        self._database.drop_table(f"{PREFIX}{space}", ignore_missing=True)

    def forget_others(self, spaces: Collection[str]) -> None:
        """Close the tables of all other spaces."""
        for space in {*self._open, *self._appends}.difference(spaces):
            self.forget(space)

    def forget(self, space: str) -> None:
        """Close a space's table: the next call opens what is there by then."""
        self._open.pop(space, None)
        self._appends.pop(space, None)

    def _nearest(self, space: str, vector: npt.NDArray[np.float32], k: int) -> Any:
        table = self._table(space)
        if table is None:
            return None
        if table.schema.field("vector").type.list_size != len(vector):
            raise StoreError(f"the index of {space} has another dimension than the query.", "Report this.")
        return table.search(vector, vector_column_name="vector").distance_type("cosine").limit(k)

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
        if table is not None and not _has_key(table.schema):
            table = self._open[space] = self._rewrite(space, table)
        return table

    def _create(self, space: str, schema: pa.Schema) -> Any:
        """The table, made where there is none. Of two that make it at once one does, and the other takes it.

        Not LanceDB's create_table: that one, when it loses the race, overwrites the winner's table. With no retries the
        commit writes version 1 or fails.
        """
        trouble: Exception | None = None
        try:
            lance.LanceDataset.commit(self._address(space), lance.LanceOperation.Overwrite(schema, []), max_retries=0)
        except OSError as error:
            trouble = error
        table = self._keyed(space)
        if table is None:
            raise StoreUnavailable(f"the table of image space {space} cannot be made: {trouble}.", "It is tried again.")
        return table

    def _rewrite(self, space: str, table: Any) -> Any:
        """Give a table of an older version its primary key; rows that two writers both added become one."""
        data = table.to_arrow()
        first = {sample: index for index, sample in reversed(list(enumerate(data["id"].to_pylist())))}
        unique = data.take(sorted(first.values())).cast(_with_key(data.schema))
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


def _table_of(rows: pa.Table, vectors: npt.NDArray[np.float32]) -> pa.Table:
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), vectors.shape[1])
    data = pa.table(
        {
            "id": rows["id"].cast(pa.string()),
            "vector": column,
            "domain": rows["domain"].cast(pa.string()),
            "source": rows["source"].cast(pa.string()),
            "time": rows["time"].cast(pa.timestamp("us", tz="UTC")),
            "text": rows["text"].cast(pa.string()),
        }
    )
    return data.cast(_with_key(data.schema))


def _with_key(schema: pa.Schema) -> pa.Schema:
    key = pa.field("id", pa.string(), nullable=False, metadata=PRIMARY_KEY)
    return pa.schema([key if field.name == "id" else field for field in schema])


def _has_key(schema: pa.Schema) -> bool:
    metadata = schema.field("id").metadata or {}
    return any(key.decode() in PRIMARY_KEY for key in metadata)


def _quoted(ids: Collection[str]) -> Iterator[str]:
    """Lists of SQL strings, some hundred ids in each."""
    wanted = sorted(each for each in ids if each.isalnum())
    for start in range(0, len(wanted), IDS_AT_ONCE):
        yield ", ".join(f"'{each}'" for each in wanted[start : start + IDS_AT_ONCE])
