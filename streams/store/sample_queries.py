"""Queries on the sample store: samples by filter, counts by domain, source and concept, and receipts. They scan whole
columns in bounded memory: for people, not for the path of a record."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

import pyarrow as pa
import pyarrow.compute as pc

from core.errors import RecordError
from streams.store.conditions import at_offset, in_gap, moment, quarantine_condition, quoted
from streams.store.rows import (
    HELD,
    SAMPLE_COLUMNS,
    Position,
    RecordPosition,
    Split,
    Tally,
    chunks,
    name_of,
    parse_stream,
)
from streams.store.sample_store import SampleStore

RecordOutcome = Literal[
    "stored", "held", "duplicate", "refused", "tombstone", "deleted", "lost", "no_record", "not_read_yet"
]  # fmt: skip
"""stored        a sample, in the split ``split``
held          a sample that is not used until an operator accepts it, for ``reason``
duplicate     repeats the sample ``duplicate_of``; ``reason`` is duplicate_exact, duplicate_perceptual, or
              duplicate_older than the record that corrected it
refused       in quarantine, for ``reason``
tombstone     a request to delete, recorded
deleted       the record's rows, or the tombstone's request, were deleted at ``time`` for ``reason``
lost          its offset was never read: ``reason`` is retention or skipped
no_record     its offset was passed without a record: a transaction marker, or before the first read
not_read_yet  the partition has not been read so far"""
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
_ID: Final = re.compile(r"[0-9a-f]{8,64}")


@dataclass(frozen=True, slots=True)
class Receipt:
    stream: str
    """The topic, with its generation if it was recreated (topic@1)."""
    partition: int
    offset: int
    outcome: RecordOutcome
    id: str = ""
    duplicate_of: str = ""
    reason: str = ""
    detail: str = ""
    source: str = ""
    split: str = ""
    time: datetime | None = None

    @property
    def position(self) -> str:
        return name_of((self.stream, self.partition, self.offset))

    def as_json(self) -> dict[str, Any]:
        """JSON form: times as ISO 8601, empty fields left out."""
        values = {**asdict(self), "position": self.position, "time": self.time and self.time.isoformat()}
        return {name: value for name, value in values.items() if value not in ("", None)}


def trace(store: SampleStore, query: RecordPosition | str) -> list[Receipt]:
    """The receipts of a record, by its position; or of a sample and all records that repeat it, by its ID. A topic
    stands for all of its logs; ``topic@1`` is one of them. A position has at least one receipt, and more if it was read
    before its log was cut off, its sample was deleted since, or the topic was recreated; the latest comes first. An ID
    (64 hex digits, or at least the first eight) has at most :data:`MAX_RECEIPTS`, none if it is unknown. Raises
    RecordError if it is not a sample ID, StoreUnavailable if the store cannot be read now."""
    return _by_id(store, query) if isinstance(query, str) else _by_position(store, query)


def id_condition(text: str) -> str:
    """Condition on rows whose ID is, or begins with, ``text``: a range, so that the index on the ID serves it. Raises
    RecordError if it is not part of an ID."""
    if not _ID.fullmatch(text):
        raise RecordError("id", f"{text[:80]!r} is not a sample id.", "It has 64 hex digits; the first 8 are enough.")
    return f"id = {quoted(text)}" if len(text) == 64 else f"id >= {quoted(text)} AND id < {quoted(text + 'g')}"


def _by_position(store: SampleStore, query: RecordPosition) -> list[Receipt]:
    topic, partition, offset = query
    known = store.positions().values()
    streams = _generations(known, topic)
    receipts: list[Receipt] = []
    for stream in streams:
        where = f"kind != 'position' AND kind != 'gap' AND {at_offset(stream, partition, offset)}"
        rows = store.select(where, _COLUMNS) + store.select(in_gap(stream, partition, offset), _COLUMNS)
        rows.sort(key=lambda row: (row["ingested_at"] is not None, row["ingested_at"]), reverse=True)
        receipts += [_receipt({**row, "offset": offset}) for row in rows]
    if receipts:
        return receipts
    newest = streams[0]
    read = any(each.stream == newest and each.partition == partition and each.next > offset for each in known)
    return [Receipt(newest, partition, offset, "no_record" if read else "not_read_yet")]


def _generations(known: Iterable[Position], topic: str) -> list[str]:
    if "@" in topic:
        return [topic]
    streams = {each.stream for each in known if parse_stream(each.stream)[0] == topic}
    return sorted(streams, key=lambda stream: parse_stream(stream)[1], reverse=True) or [topic]


def _by_id(store: SampleStore, text: str) -> list[Receipt]:
    rows = store.select(f"kind != 'position' AND {id_condition(text)}", _COLUMNS, MAX_RECEIPTS)
    # Perceptual duplicates have IDs of their own. ``duplicate_of`` has no index, so it is read only if there are
    # duplicates at all.
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
    held = row["kind"] == "sample" and texts["split"].startswith(HELD)
    outcome: RecordOutcome = "held" if held else _OUTCOMES[row["kind"]]
    return Receipt(row["topic"], row["partition"], row["offset"], outcome, time=row["ingested_at"], **texts)


LIST_COLUMNS: Final = (
    "id", "split", "domain", "source", "concept", "label", "text", "question", "answer", "width", "height", "time",
)  # fmt: skip
IMAGE_ROWS: Final = 16
"""At 8 MiB per image, a batch takes 128 MiB."""
OTHERS: Final = "(others)"
MAX_VALUES: Final = 50_000
"""Values counted at once; beyond that the rarest are dropped."""


@dataclass(frozen=True, slots=True)
class SampleFilter:
    split: Split | None = None
    domain: str | None = None
    source: str | None = None
    concept: str | None = None
    text: str | None = None
    """Substring of text, question or answer, ignoring case."""
    since: datetime | None = None

    def where(self) -> str:
        clauses = ["kind = 'sample'"]
        for name in ("split", "domain", "source", "concept"):
            value = getattr(self, name)
            if value is not None:
                clauses.append(f"{name} = {quoted(value)}")
        if self.text is not None:
            words = f"lower({quoted(self.text)})"
            fields = " OR ".join(f"contains(lower({name}), {words})" for name in ("text", "question", "answer"))
            clauses.append(f"({fields})")
        if self.since is not None:
            clauses.append(f"ingested_at >= {moment(self.since)}")
        return " AND ".join(clauses)

    @property
    def is_empty(self) -> bool:
        return self == SampleFilter()


def newest_samples(store: SampleStore, which: SampleFilter, limit: int) -> list[dict[str, Any]]:
    return store.newest(limit, which.where(), LIST_COLUMNS)


def with_images(store: SampleStore, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for group in chunks(rows, IMAGE_ROWS):
        images = store.image([row["id"] for row in group])
        for row in group:
            if row["id"] in images:
                yield {**row, "image": images[row["id"]]}


def find_samples(store: SampleStore, sample_id: str, limit: int = 10) -> list[dict[str, Any]]:
    """Samples, with images, whose ID is or begins with ``sample_id``. Raises RecordError, StoreUnavailable."""
    return store.select(f"kind = 'sample' AND {id_condition(sample_id)}", SAMPLE_COLUMNS, limit)


def stream_samples(store: SampleStore, which: SampleFilter, version: int | None = None) -> Iterator[dict[str, Any]]:
    for batch in store.batches(which.where(), SAMPLE_COLUMNS, IMAGE_ROWS, version):
        for index in range(batch.num_rows):  # one image as a Python object at a time
            yield {name: batch.column(name)[index].as_py() for name in SAMPLE_COLUMNS}


def count_samples(store: SampleStore, which: SampleFilter, version: int | None = None) -> int:
    if which.is_empty:
        return store.count(version)
    return sum(batch.num_rows for batch in store.batches(which.where(), ["offset"], version=version))


@dataclass
class ValueCounts:
    """Counts of a column's values, without the rarest if there are too many."""

    counts: Counter[str] = field(default_factory=Counter)
    omitted: int = 0
    """Rows of dropped values. A value may have rows here that were counted before it was dropped."""

    def add(self, values: pa.Array) -> None:
        for each in pc.value_counts(values):
            self.counts[each["values"].as_py() or ""] += each["counts"].as_py()
        if len(self.counts) > MAX_VALUES:
            most_common = Counter(dict(self.counts.most_common(MAX_VALUES // 2)))
            self.omitted += self.counts.total() - most_common.total()
            self.counts = most_common

    def top(self, limit: int) -> list[tuple[str, int]]:
        rows = self.counts.most_common(limit)
        others = self.counts.total() + self.omitted - sum(count for _, count in rows)
        return [*rows, (OTHERS, others)] if others else rows


@dataclass
class StoreStats:
    version: int
    tally: Tally
    size: int
    """Bytes of the data files, including what is not compacted yet."""
    samples: dict[str, ValueCounts]
    refusals: dict[str, ValueCounts]


def store_stats(store: SampleStore) -> StoreStats:
    version = store.version()
    samples = count_values(store, "kind = 'sample'", ("domain", "source", "concept"), version)
    return StoreStats(version, store.tally(version), store.size(), samples, quarantine_counts(store, version=version))


def quarantine_counts(
    store: SampleStore, reason: str | None = None, source: str | None = None, version: int | None = None
) -> dict[str, ValueCounts]:
    return count_values(store, quarantine_condition(reason, source), ("reason", "source"), version)


def count_values(
    store: SampleStore, where: str, columns: Sequence[str], version: int | None = None
) -> dict[str, ValueCounts]:
    counts = {name: ValueCounts() for name in columns}
    for batch in store.batches(where, columns, version=version):
        for name, values in counts.items():
            values.add(batch.column(name))
    return counts
