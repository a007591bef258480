from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from my_index import database

from core.ledger.rows import IndexRow
from serving.indexes.store import Counts, PendingRow, Skip, Vector


class MyStore:
    def __init__(self, index: IndexRow) -> None:
        self._name, self._table = index.name, index.source
        self._rows = database.tables[index.source]

    def open(self, space: str, dim: int) -> None: ...

    def pending(self, space: str, limit: int, after: str | None = None) -> Sequence[PendingRow]:
        rows = [
            PendingRow(id, row["image"], row["image"])
            for id, row in sorted(self._rows.items())
            if id > (after or "") and space not in row["vectors"] and row["skip"] is None
        ]
        return rows[:limit]

    def write(self, space: str, rows: Sequence[tuple[PendingRow, Vector | Skip]]) -> int:
        same = [(row, value) for row, value in rows if self._rows[row.id]["image"] == row.version]
        for row, value in same:
            if isinstance(value, Skip):
                self._rows[row.id]["skip"] = value
            else:
                self._rows[row.id]["vectors"][space] = value
        return len(same)

    def counts(self, space: str) -> Counts:
        skips = [row["skip"] for row in self._rows.values() if row["skip"] is not None]
        filled = sum(space in row["vectors"] for row in self._rows.values())
        return Counts(filled, len(self._rows), len(skips), sum(skip.transient for skip in skips))

    def build(self, space: str) -> None: ...

    def sample(self, space: str, count: int) -> Sequence[Vector]:
        return self._vectors(space)[:count]

    def search(self, space: str, vector: Vector, count: int, exact: bool) -> Sequence[float]:
        return sorted((float(each @ vector) for each in self._vectors(space)), reverse=True)[:count]

    def point(self, space: str) -> None:
        database.views[self._name] = self._table, space

    def drop(self, space: str) -> None:
        for row in self._rows.values():
            row["vectors"].pop(space, None)

    def close(self) -> None: ...

    def _vectors(self, space: str) -> list[Vector]:
        return [np.asarray(row["vectors"][space]) for row in self._rows.values() if space in row["vectors"]]
