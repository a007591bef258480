"""One LanceDB table per image space: id, vector, domain, source, time, text.

The search is exact (flat): at up to some 100 000 rows it answers in milliseconds, and it is the oracle that an
approximate index would be measured against.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import timedelta
from typing import Any

import lancedb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ops.errors import StoreError
from serving.catalog.queries import Filters, Hit

IDS_AT_ONCE = 500
COMPACT_EVERY = 32
"""Appends between two compactions. Each append is a fragment; scans of thousands of fragments are slow."""


class Tables:
    """The tables of all image spaces under one URL. One writer; use from one thread at a time."""

    def __init__(self, url: str) -> None:
        self._database = lancedb.connect(url)
        self._open: dict[str, Any] = {}
        self._appends: dict[str, int] = {}

    def spaces(self) -> list[str]:
        """Image spaces that have a table."""
        names = self._database.list_tables()
        return sorted(name.removeprefix("clip_") for name in getattr(names, "tables", names))

    def ids(self, space: str) -> set[str]:
        """Ids of all rows of a space; empty when there is no table."""
        table = self._table(space)
        if table is None:
            return set()
        return set(table.search().select(["id"]).limit(None).to_arrow()["id"].to_pylist())

    def append(self, space: str, rows: pa.Table, vectors: npt.NDArray[np.float32]) -> None:
        """Add rows (id, domain, source, time, text) with their vectors [n, dim] in one atomic commit."""
        dim = vectors.shape[1]
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1), pa.float32()), dim)
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
        table = self._table(space)
        if table is None:
            self._open[space] = self._database.create_table(f"clip_{space}", data)
            return
        table.add(data)
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
        hits = [
            Hit(row["id"], 1.0 - float(row["_distance"]), row["text"] or "", row["domain"] or "", row["source"] or "",
                row["time"])
            for row in found
        ]  # fmt: skip
        return sorted(hits, key=lambda hit: (-hit.score, hit.id))

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
        wanted = sorted(each for each in ids if each.isalnum())
        for start in range(0, len(wanted) if table is not None else 0, IDS_AT_ONCE):
            names = ", ".join(f"'{each}'" for each in wanted[start : start + IDS_AT_ONCE])
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
        if self._table(space) is not None:
            del self._open[space]
            self._database.drop_table(f"clip_{space}")

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
            self._open[space] = self._database.open_table(f"clip_{space}")
        return self._open.get(space)
