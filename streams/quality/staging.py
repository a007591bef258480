"""Samples on their way from the store to the duplicate index."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from streams.quality.bands import bands_of_all
from streams.quality.sides import COLUMNS, SplitRule

STAGED_ROWS: Final = 1_000_000
"""Samples put in order at once: some 150 MB of a temporary file."""


class Staging:
    """Samples on their way from the store to the index, which takes them in the order of its keys.

    Inserted as they come, each would change another page of the file: three quarters of the time, at a million samples.
    SQLite sorts them outside of memory.
    """

    def __init__(self, db: sqlite3.Connection, masks: Sequence[int], split: SplitRule) -> None:
        self._db = db
        self._masks = masks
        self._split = split
        self._rows = 0
        self._bands = [f"band{number}" for number in range(len(masks))]
        numbers = ", ".join(f"{name} INTEGER" for name in ("held", *COLUMNS, *self._bands))
        columns = f"id BLOB, position TEXT, look BLOB, {numbers}"
        db.execute(f"CREATE TEMP TABLE IF NOT EXISTS staged ({columns})")

    @property
    def full(self) -> bool:
        """Whether to merge now, so that the temporary file stays small."""
        return self._rows >= STAGED_ROWS

    def add(self, samples: pa.Table) -> None:
        """Stage samples: rows of the store with their id, topic, partition, offset, look, words, split, domain and
        question."""
        numbers = (samples[name].cast(pa.string()) for name in ("partition", "offset"))
        positions = pc.binary_join_element_wise(samples["topic"], *numbers, ":").to_pylist()
        ids, looks = list(map(bytes.fromhex, samples["id"].to_pylist())), samples["look"].to_pylist()
        held = pc.equal(samples["split"], "fresh_eval").to_pylist()
        groups = (samples[name].to_pylist() for name in ("domain", "question"))
        sides = [
            self._split.columns(look, domain or "", bool(question))
            for look, domain, question in zip(looks, *groups, strict=True)
        ]
        bands = bands_of_all(looks, samples["words"].to_numpy(), self._masks)
        columns = zip(ids, positions, looks, held, *zip(*sides, strict=True), *bands, strict=True)
        marks = ", ".join("?" * (4 + len(COLUMNS) + len(self._bands)))
        self._db.executemany(f"INSERT INTO staged VALUES ({marks})", columns)  # noqa: S608
        self._rows += len(ids)

    def merge(self) -> list[tuple[bytes, str, str]]:
        """Move what is staged to the index. Returns samples that it has at another position: id, that one, and this."""
        self._split.note_staged(self._db)
        before = self._db.total_changes
        self._db.execute("INSERT OR IGNORE INTO ids SELECT id, position FROM staged ORDER BY id")
        doubles: list[tuple[bytes, str, str]] = []
        if self._db.total_changes - before < self._rows:
            query = "SELECT staged.id, ids.position, staged.position FROM staged JOIN ids USING (id)"
            doubles = self._db.execute(f"{query} WHERE ids.position != staged.position").fetchall()
        if self._bands:
            looks = (f"SELECT {band} AS band, id, look FROM staged WHERE look IS NOT NULL" for band in self._bands)  # noqa: S608
            self._db.execute(f"INSERT OR IGNORE INTO looks {' UNION ALL '.join(looks)} ORDER BY band, id")
        self._db.execute("DELETE FROM staged")
        self._rows = 0
        return doubles
