"""Which samples are held out: the side of the split that each gets when it is stored.

Look-alikes stay together while they are few. A bucket is what agrees in the coarse bits of its look
(:func:`streams.ingest.quality.look.buckets`); it takes the side of its first picture until :data:`FEW` are in it. Past
that, as with the pictures of one form, of one camera or of one colour, finer bits decide. Pictures of one look always
have one side.

New buckets are assigned so that each group of samples, those of one domain with a text or with a question, has its
share: by a keyed hash, unless the group has :data:`TOLERANCE` samples too many or too few (a big stick design: Soares
and Wu, "Some restricted randomization rules in sequential clinical trials", 1983).

The state is in tables of the duplicate index, which are made again from what is stored: the side of a stored sample is
the one in its row. Names are keyed hashes, so the tables say nothing of a picture.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

from streams.ingest.quality.look import Look, buckets
from streams.store.rows import Split

FEW: Final = 4
"""Pictures of a bucket that stay together: an original with its copies in other sizes and encodings."""
TOLERANCE: Final = 2.0
"""Held-out samples by which a group may be off its share when a bucket is assigned. Those that join it later can take
it further: over 300 samples of one kind the share is 0.14 to 0.18."""
MOST_OWED: Final = 30.0
"""Held-out samples that a group makes up for. A share that was changed, or samples of an earlier version that had one
side alone, are not made up for by a long stretch of the other."""
COLUMNS: Final = ("coarse", "fine", "exact", "grp")
"""Of :meth:`SplitRule.columns`."""
TABLES: Final = (
    "CREATE TABLE sides (name INTEGER PRIMARY KEY, held INTEGER, seen INTEGER);"
    "CREATE TABLE owed (name INTEGER PRIMARY KEY, held REAL);"
)


@dataclass(frozen=True, slots=True)
class SplitRule:
    """How an installation splits."""

    key: bytes = b""
    """Secret of the installation, so that no producer can choose a side by computing it."""
    share: float = 0.0
    """Of the samples that are held out, from 0 to 1."""

    def columns(self, look: bytes | None, domain: str, asks: bool) -> tuple[int | None, ...]:
        """Values of :data:`COLUMNS` for a sample: its buckets, and its group.

        Args:
            look: :attr:`streams.ingest.quality.look.Look.data`; None where there is none, which is counted in its group
            alone. domain: of the sample. asks: whether it has a question.
        """
        names = (None, None, None) if look is None else map(self._name, buckets(Look.parse(look)))
        return *names, self._name(f"{asks:d} {domain}".encode())

    def assign(self, db: sqlite3.Connection, columns: Sequence[int | None]) -> Split:
        """Decide the side of a sample that is not stored yet, by its :meth:`columns`, and count it."""
        held = self._decide(db, *columns)
        rows = [(name, held) for name in columns[:3] if name is not None]
        db.executemany("INSERT INTO sides VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET seen = seen + 1", rows)
        _owe(db, "VALUES (?, ?)", (columns[3], self.share - held))
        return "fresh_eval" if held else "train"

    def _decide(
        self, db: sqlite3.Connection, coarse: int | None, fine: int | None, exact: int | None, group: int | None
    ) -> bool:
        """Whether it is held out."""
        found = db.execute("SELECT name, held, seen FROM sides WHERE name IN (?, ?, ?)", (coarse, fine, exact))
        known = {name: (bool(held), seen) for name, held, seen in found}
        if exact in known:
            return known[exact][0]
        for name in (fine, coarse):
            held, seen = known.get(name, (False, FEW))
            if seen < FEW:
                return held
        row = db.execute("SELECT held FROM owed WHERE name = ?", (group,)).fetchone()
        owed = 0.0 if row is None else row[0]
        if abs(owed) >= TOLERANCE:
            return bool(owed > 0)
        name = next((each for each in (coarse, fine) if each not in known), exact)
        return (name or 0) % 2**64 < self.share * 2**64

    def note_staged(self, db: sqlite3.Connection) -> None:
        """Count the samples of the table ``staged``, with :data:`COLUMNS` and ``held``, that ``ids`` lacks yet."""
        new = "FROM staged WHERE NOT EXISTS (SELECT 1 FROM ids WHERE ids.id = staged.id)"
        for name in COLUMNS[:3]:
            db.execute(
                f"INSERT INTO sides SELECT {name}, max(held), count(*) {new} AND {name} IS NOT NULL GROUP BY {name}"
                f" ORDER BY {name} ON CONFLICT DO UPDATE SET seen = seen + excluded.seen"
            )
        _owe(db, f"SELECT grp, sum(? - held) {new} GROUP BY grp", (self.share,))

    def _name(self, data: bytes) -> int:
        return int.from_bytes(blake2b(data, key=self.key, person=b"split", digest_size=8).digest(), signed=True)


def _owe(db: sqlite3.Connection, values: str, parameters: Sequence[float | None]) -> None:
    """Add what some groups are owed: held-out samples by their share, less those that there are."""
    bounded = f"max(-{MOST_OWED}, min({MOST_OWED}, held + excluded.held))"
    db.execute(f"INSERT INTO owed {values} ON CONFLICT DO UPDATE SET held = {bounded}", parameters)
