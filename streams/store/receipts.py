"""Receipts: what became of a record.

>>> trace(store, RecordQuery("ratchet.samples", 0, 42))
[Receipt(stream='ratchet.samples', partition=0, offset=42, outcome='stored', ...)]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, Literal

from core.errors import RecordError
from streams.store.rows import Position, at_offset, in_gap, parse_stream, quoted
from streams.store.sample_store import SampleStore

RecordOutcome = Literal["stored", "duplicate", "refused", "tombstone", "deleted", "lost", "no_record", "not_read_yet"]
"""
stored        a sample; ``split`` says of which split
duplicate     not stored: it repeats the sample ``duplicate_of``; ``reason`` is duplicate_exact,
              duplicate_perceptual, or duplicate_older than the record that corrected it
refused       in quarantine, for ``reason``
tombstone     a wish to delete, taken in
deleted       what was stored of it, or the tombstone's wish, was deleted at ``time`` for ``reason``
lost          its offset was never read: ``reason`` is retention or skipped
no_record     its offset was passed, and no record stood there: the mark of a transaction, or before the first read
not_read_yet  the partition has not been read so far
"""
MAX_RECEIPTS: Final = 1000
_OUTCOMES: Final[Mapping[str, RecordOutcome]] = {
    "sample": "stored",
    "duplicate": "duplicate",
    "quarantine": "refused",
    "tombstone": "tombstone",
    "deleted": "deleted",
    "gap": "lost",
}
_COLUMNS: Final = (
    "kind", "topic", "partition", "offset", "id", "reason", "detail", "duplicate_of", "until", "ingested_at", "split",
    "source",
)  # fmt: skip
_POSITION: Final = re.compile(r"([^:]{1,260}):([0-9]{1,9}):([0-9]{1,18})")
_ID: Final = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class RecordQuery:
    """A record, by its position. ``stream`` is a topic, which stands for all of its logs, or one of them (topic@1)."""

    stream: str
    partition: int
    offset: int

    @classmethod
    def parse(cls, text: str) -> RecordQuery:
        """From ``topic:partition:offset``. Raises RecordError."""
        match = _POSITION.fullmatch(text)
        if match is None:
            raise RecordError(
                "position", f"{text[:300]!r} is no position of a record.", "It reads topic:partition:offset."
            )
        return cls(match[1], int(match[2]), int(match[3]))

    def __str__(self) -> str:
        return f"{self.stream}:{self.partition}:{self.offset}"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of one record. Strings are empty where there is no value."""

    stream: str
    """The topic, with its generation if it was made anew (topic@1)."""
    partition: int
    offset: int
    outcome: RecordOutcome
    id: str = ""
    """Of its sample."""
    duplicate_of: str = ""
    reason: str = ""
    """A code: of a refusal, a duplicate, a loss or a deletion."""
    detail: str = ""
    """The reason in words."""
    source: str = ""
    split: str = ""
    time: datetime | None = None
    """When this was decided (UTC)."""

    @property
    def position(self) -> str:
        """``topic:partition:offset``."""
        return f"{self.stream}:{self.partition}:{self.offset}"

    def as_json(self) -> dict[str, Any]:
        """The receipt as JSON holds it: times as ISO 8601, and without what is empty."""
        values = {**asdict(self), "position": self.position, "time": self.time and self.time.isoformat()}
        return {name: value for name, value in values.items() if value not in ("", None)}


def trace(store: SampleStore, query: RecordQuery | str) -> list[Receipt]:
    """What became of a record, by its position; or of a sample and of all records that repeat it, by its id.

    By position there is always one receipt, and there are more where more happened: a record that was read before its
    log was cut off, a sample that was deleted since, a topic of this name that was made anew. The last one is first.
    By id (64 hex digits, or at least the first eight) there are at most :data:`MAX_RECEIPTS`, and none for an unknown
    one; refused records have no id.

    Raises:
        RecordError: the id is none.
        StoreUnavailable: the store cannot be read now.
    """
    return _by_id(store, query) if isinstance(query, str) else _by_position(store, query)


def id_condition(text: str) -> str:
    """The condition of rows whose id is, or begins with, ``text``. A range, so that the index on the id serves it.

    Raises:
        RecordError: it is no part of an id.
    """
    if not _ID.fullmatch(text):
        raise RecordError("id", f"{text[:80]!r} is no id of a sample.", "It has 64 hex digits; the first 8 are enough.")
    return f"id = {quoted(text)}" if len(text) == 64 else f"id >= {quoted(text)} AND id < {quoted(text + 'g')}"


def _by_position(store: SampleStore, query: RecordQuery) -> list[Receipt]:
    known = store.positions().values()
    streams = _generations(known, query)
    receipts: list[Receipt] = []
    for stream in streams:
        where = f"kind != 'position' AND kind != 'gap' AND {at_offset(stream, query.partition, query.offset)}"
        rows = store.select(where, _COLUMNS) + store.select(in_gap(stream, query.partition, query.offset), _COLUMNS)
        rows.sort(key=lambda row: (row["ingested_at"] is not None, row["ingested_at"]), reverse=True)
        receipts += [_receipt({**row, "offset": query.offset}) for row in rows]
    if receipts:
        return receipts
    newest = streams[0]
    read = any(
        each.stream == newest and each.partition == query.partition and each.next > query.offset for each in known
    )
    return [Receipt(newest, query.partition, query.offset, "no_record" if read else "not_read_yet")]


def _generations(known: Iterable[Position], query: RecordQuery) -> list[str]:
    """The logs that a topic's name stands for, the newest first."""
    if "@" in query.stream:
        return [query.stream]
    streams = {each.stream for each in known if parse_stream(each.stream)[0] == query.stream}
    return sorted(streams, key=lambda stream: parse_stream(stream)[1], reverse=True) or [query.stream]


def _by_id(store: SampleStore, text: str) -> list[Receipt]:
    rows = store.select(f"kind != 'position' AND {id_condition(text)}", _COLUMNS, MAX_RECEIPTS)
    # Those that only look like the sample have ids of their own. Their column has no index, so it is read only where
    # there are duplicates at all.
    ids = {row["id"] for row in rows}
    if len(ids) == 1 and store.tally()["duplicate"]:
        [sample] = ids
        where = f"kind = 'duplicate' AND duplicate_of = {quoted(sample)} AND id != {quoted(sample)}"
        rows += store.select(where, _COLUMNS, MAX_RECEIPTS - len(rows))
    order = ["sample", "deleted"]
    rows.sort(key=lambda row: (order.index(row["kind"]) if row["kind"] in order else 9, str(row["ingested_at"])))
    return [_receipt(row) for row in rows[:MAX_RECEIPTS]]


def _receipt(row: Mapping[str, Any]) -> Receipt:
    texts = {name: row[name] or "" for name in ("id", "duplicate_of", "reason", "detail", "source", "split")}
    return Receipt(
        row["topic"], row["partition"], row["offset"], _OUTCOMES[row["kind"]], time=row["ingested_at"], **texts
    )
