"""Samples on their way from the store to the duplicate index, and the numbers by which it finds looks that are alike.

A hash is cut into ``distance + 1`` bands: two hashes that differ in fewer bits than there are bands agree in one of
them (pigeonhole; Norouzi et al., Fast Exact Search in Hamming Space, 2012). A band's number is made of its bits and of
the words of the sample.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from streams.ingest.quality.sides import COLUMNS, SplitRule

_ALL_BITS: Final = 2**64 - 1
_SIGN: Final = 2**63
"""SQLite's integers are signed."""
_ODD: Final = 0x9E3779B97F4A7C15
_NO_PHASH: Final = bytes(8)


def masks(distance: int) -> list[int]:
    """One mask of 64 bits for each band; together they cover each bit once. None for a negative distance."""
    ends = [64 * number // (distance + 1) for number in range(distance + 2)] if distance >= 0 else []
    return [((1 << (end - start)) - 1) << start for start, end in pairwise(ends)]


def bands_of(phash: int, words: int, masks: Sequence[int]) -> list[int]:
    """Numbers of a look's bands, signed 64 bits."""
    return [((words + (phash & mask) * _ODD + number) & _ALL_BITS) - _SIGN for number, mask in enumerate(masks)]


def bands_of_all(looks: Sequence[bytes | None], words: npt.NDArray[Any], masks: Sequence[int]) -> Iterator[list[int]]:
    """For each band its numbers in all looks, as by :func:`bands_of`; any number for one that is None.

    Args:
        looks: each beginning with the 8 bytes of its hash, the highest first.
        words: [N], int64.
    """
    phashes = np.frombuffer(b"".join((look or _NO_PHASH)[:8] for look in looks), ">u8").astype(np.uint64)
    for number, mask in enumerate(masks):
        with np.errstate(over="ignore"):
            hashes = (phashes & np.uint64(mask)) * np.uint64(_ODD)
            numbers = words.astype(np.uint64) + hashes + np.uint64(number) - np.uint64(_SIGN)
        yield numbers.view(np.int64).tolist()


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
