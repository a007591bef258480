"""The records between two commits, and the corrections among them.

A record with the content, key and source of a stored sample but other metadata replaces it; from another source it is a
duplicate, so that two senders of the same content do not alternate. A record with other content replaces what its
header ``ratchet_replaces`` names: a sample by its ID, or everything earlier with the record's key. A key alone is no
correction: many producers use one key for a whole camera or user. The newest wins, by send time: a record older than
the sample it would replace, or than the record that replaced it, is a duplicate.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final

import pyarrow as pa

from core import metrics
from core.errors import StoreError, StoreUnavailable
from core.settings.streams import Kafka
from streams.ingest.duplicates import CORRECTED, Duplicate, DuplicateIndex, KnownSample
from streams.ingest.membership import BATCH_BYTES, PartitionReader
from streams.ingest.sources import Holds
from streams.ingest.validate import BY_KEY, Accepted, StoreRow, quarantine_row
from streams.store.conditions import IDS_PER_QUERY, hexadecimal, is_in, quoted
from streams.store.rows import (
    CLAIM,
    SCHEMA,
    Position,
    RecordPosition,
    SampleTable,
    chunks,
    deletion_row,
    duplicate_row,
    name_of,
    position_of,
    reading_store,
    tally_of,
)
from streams.store.writer import StoreWriter

log = logging.getLogger(__name__)
Entry = tuple[PartitionReader, int, Accepted | StoreRow, int]
"""Partition reader; the first offset after the record; the sample, or the row of another outcome; bytes."""


@dataclass
class CommitResult:
    version: int = 0
    samples: Counter[str] = field(default_factory=Counter)
    duplicates: Counter[str] = field(default_factory=Counter)
    corrected: int = 0
    rows: list[StoreRow] = field(default_factory=list)
    readings: list[PartitionReader] = field(default_factory=list)
    records: int = 0
    size: int = 0

    def of_kind(self, kind: str) -> list[StoreRow]:
        return [row for row in self.rows if row["kind"] == kind]


class Batch:
    def __init__(self, kafka: Kafka, writer: StoreWriter, index: DuplicateIndex, holds: Holds) -> None:
        self.kafka = kafka
        self.writer = writer
        self.index = index
        self.holds = holds
        self._entries: list[Entry] = []
        self._readings: set[PartitionReader] = set()
        self._bytes = 0
        self._since = 0.0
        self._doubles: list[tuple[str, RecordPosition]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, reading: PartitionReader, end: int, result: Accepted | StoreRow, size: int) -> None:
        """Add a record of ``size`` bytes; ``end`` is the next offset after it."""
        if not self._entries:
            self._since = time.monotonic()
        self._entries.append((reading, end, result, size))
        self._readings.add(reading)
        self._bytes += size

    @property
    def due(self) -> bool:
        return bool(self._entries) and (
            len(self._entries) >= self.kafka.batch_records or self._bytes >= BATCH_BYTES or self.seconds_left <= 0
        )

    @property
    def seconds_left(self) -> float:
        """Time until a commit is due; infinite for an empty batch."""
        if not self._entries:
            return float("inf")
        return self._since + self.kafka.batch_seconds - time.monotonic()

    def drop(self, holds: Callable[[PartitionReader], bool]) -> None:
        lost = {reading for reading in self._readings if not holds(reading)}
        if lost:
            self._readings -= lost
            self._entries = [entry for entry in self._entries if entry[0] not in lost]
            self._bytes = sum(size for *_, size in self._entries)

    def commit(self, watermark: Callable[[PartitionReader], int | None]) -> CommitResult:
        """Store all records in one commit, and empty the batch. ``watermark`` is the offset of a reader's first
        unpublished quarantined record, or None. Stores nothing and raises Superseded if another process
        has claimed some of the partitions: try again without them (:meth:`drop`); or StoreUnavailable: try again."""
        ends = {reading: reading.behind(end) for reading, end, _, _ in self._entries}
        outcome = CommitResult(
            readings=list(ends), records=len(self._entries), size=sum(size for *_, size in self._entries)
        )
        if not ends:
            return outcome
        try:
            with self.index.deciding():
                newest = self.index.follow(self.writer.table)
                replaced = self._decide(outcome)
                moves = [
                    (reading.claim, _position(reading, end, outcome.rows, watermark(reading)))
                    for reading, end in ends.items()
                ]
                outcome.version = self.writer.commit(outcome.rows, moves, replaced, newest)
                self.holds.stored()
                if not outcome.corrected:  # otherwise it is read again: samples may have passed to other records
                    self.index.stored(outcome.version, max(reading.claim.fragment for reading in ends))
        except StoreUnavailable as error:
            if not outcome.version:
                raise
            log.warning("the batch is stored; the duplicate index takes it from the store later: %s", error)
        except (TypeError, ValueError, OverflowError):
            if not self._quarantine_misfits():
                raise
            return self.commit(watermark)
        self._entries, self._readings, self._bytes = [], set(), 0
        self._settle_doubles()
        return outcome

    def _quarantine_misfits(self) -> bool:
        """Quarantine valid samples that the table cannot hold. Returns whether there are any. No such case is known,
        but it would be read again for ever, and stop its partition."""
        misfits = 0
        for number, (reading, end, result, size) in enumerate(self._entries):
            if isinstance(result, Accepted) and result.record is not None and (problem := _misfit(result.row)):
                log.error("record %s:%d is valid and cannot be stored: %s", reading.claim.key, end - 1, problem)
                self._entries[number] = (reading, end, quarantine_row(result.record, "internal", problem), size)
                misfits += 1
        return misfits > 0

    def _settle_doubles(self) -> None:
        """Settle samples stored twice; failures wait for the next batch, because this one is stored."""
        self._doubles += self.index.settled()
        try:
            while self._doubles:
                settled = self.writer.settle_double(*self._doubles[0])
                metrics.ingest.settled(int(settled))
                del self._doubles[0]
        except StoreError as error:
            log.warning("a sample that two workers stored is made a duplicate later: %s", error)

    def _decide(self, outcome: CommitResult) -> dict[RecordPosition, StoreRow]:
        """Choose the rows to store: samples, duplicates for those that repeat the store or this batch, others
        unchanged. Returns the receipts of stored samples that they replace."""
        accepted = [result for _, _, result, _ in self._entries if isinstance(result, Accepted)]
        self.holds.begin(each.row["source"] for each in accepted)
        corrections = Corrections(self.writer.table, self.index, accepted)
        rows = [
            self._decide_one(result, corrections, outcome) if isinstance(result, Accepted) else result
            for _, _, result, _ in self._entries
        ]
        outcome.rows = corrections.settled(rows)
        return corrections.replaced

    def _decide_one(self, record: Accepted, corrections: Corrections, outcome: CommitResult) -> StoreRow:
        row, targets = record.row, corrections.targets(record)
        position = name_of(position_of(row))
        sample = KnownSample(
            bytes.fromhex(row["id"]), position, row["look"], row["words"], row["domain"], bool(row["question"]),
            row["sent_at"],
        )  # fmt: skip
        same = next((each for each in targets if each["id"] == row["id"]), None)
        sent = row["sent_at"]  # that of rows from earlier versions is unknown
        newer = next((each for each in targets if each["sent_at"] is not None and each["sent_at"] > sent), None)
        duplicate = None if same else self.index.find(sample)
        if newer is not None:
            duplicate = Duplicate("older", newer["id"])
        if duplicate is not None and duplicate.kind == "older":
            targets = []
        for each in targets:
            corrections.replace(each, row)
            if each is not same and each["kind"] == "sample":
                self.index.correct(each["id"], row["sent_at"])
        outcome.corrected += len(targets)
        if duplicate is not None:
            outcome.duplicates[duplicate.kind] += 1
            repeated = duplicate_row(row, duplicate.kind, duplicate.id)
            if duplicate.kind == "exact":
                corrections.add(repeated)
            return repeated
        if same is None:
            row = {**row, **self.holds.place(row, self.index.add(sample))}
        else:
            row = {**row, **{name: same.get(name) for name in ("split", "reason", "detail", "until")}}
            self.index.move(row["id"], position)
        corrections.add(row)
        outcome.samples[row["split"]] += 1
        return row


def _misfit(row: StoreRow) -> str:
    try:
        pa.Table.from_pylist([row], schema=SCHEMA)
    except (TypeError, ValueError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _position(
    reading: PartitionReader, behind: tuple[int, int], rows: list[StoreRow], unpublished: int | None
) -> Position:
    position, (end, epoch) = reading.claim.position, behind
    own = [row for row in rows if (row["topic"], row["partition"]) == (position.stream, position.partition)]
    first = min((row["offset"] for row in own if row["kind"] == "quarantine"), default=end)
    published = min(end, first, end if unpublished is None else unpublished)
    return replace(position, next=end, published=published, tally=position.tally + tally_of(own), leader_epoch=epoch)


METADATA: Final = ("source", "domain", "concept", "label", "tags", "extra")
_COLUMNS: Final = [
    "kind", "topic", "partition", "offset", "id", "split", "reason", "detail", "until", "key", "text", "question",
    "sent_at", *METADATA,
]  # fmt: skip


class Corrections:
    """Samples that the records of a batch replace: stored ones, and earlier ones in the batch."""

    def __init__(self, table: SampleTable, index: DuplicateIndex, records: Sequence[Accepted]) -> None:
        """Read what the records may replace. ``index`` must be up to date with ``table``. Raises StoreUnavailable."""
        self.replaced: dict[RecordPosition, StoreRow] = {}
        self._by_id: dict[str, StoreRow] = {}
        self._by_key: dict[bytes, dict[RecordPosition, StoreRow]] = defaultdict(dict)
        ids = {each.row["id"] for each in records if each.row["key"] is not None and index.has(each.row["id"])}
        ids |= {each.replaces for each in records if each.replaces not in ("", BY_KEY)}
        keys = {each.row["key"] for each in records if each.replaces == BY_KEY}
        dataset = table.open() if ids or keys else None
        if dataset is None:
            return
        named = (("kind = 'sample'", "id", map(quoted, ids)),
                 ("(kind = 'sample' OR reason = 'duplicate_exact')", "key", map(hexadecimal, keys)))  # fmt: skip
        for kinds, column, values in named:
            for some in chunks(values, IDS_PER_QUERY):
                with reading_store(table.url):
                    rows = dataset.to_table(columns=_COLUMNS, filter=f"{kinds} AND {is_in(column, some)}").to_pylist()
                for row in rows:
                    self.add(row)

    def add(self, row: StoreRow) -> None:
        """Add a sample that is or will be stored, or a duplicate, through which its key refers to one."""
        if row["kind"] == "sample":
            self._by_id[row["id"]] = row
        if row["key"] is not None:
            self._by_key[row["key"]][position_of(row)] = row

    def targets(self, record: Accepted) -> list[StoreRow]:
        row = record.row
        found: list[StoreRow] = []
        if record.replaces == BY_KEY:
            found += self._by_key[row["key"]].values()
        elif record.replaces in self._by_id:
            found.append(self._by_id[record.replaces])
        same = self._by_id.get(row["id"])
        if same is not None and same not in found and row["key"] is not None and _sender(row) == _sender(same):
            found.append(same)
        return [
            each
            for each in found
            if each["id"] != row["id"] or (each["kind"] == "sample" and any(each[n] != row[n] for n in METADATA))
        ]

    def replace(self, old: StoreRow, new: StoreRow) -> None:
        stays = old["id"] == new["id"] or old["kind"] == "duplicate"  # content stays stored: indexes must keep it
        receipt = deletion_row(old, CORRECTED, f"by {name_of(position_of(new))}", datetime.now(UTC), stays)
        self.replaced[position_of(old)] = {**receipt, "sent_at": new["sent_at"]}
        if self._by_id.get(old["id"]) is old:
            del self._by_id[old["id"]]
        if old["key"] is not None:
            self._by_key[old["key"]].pop(position_of(old), None)

    def settled(self, rows: Sequence[StoreRow]) -> list[StoreRow]:
        """The batch's rows to store, with receipts for those replaced by later ones. :attr:`replaced` keeps those in
        the store. A replaced sample that another record of the batch also sent passes to that record."""
        receipts = {place: self.replaced.pop(place) for place in map(position_of, rows) if place in self.replaced}
        left = {
            row["id"]: row for row in rows if row["kind"] == "sample" and receipts.get(position_of(row), {}).get("id")
        }
        settled = []
        for row in rows:
            receipt = receipts.get(position_of(row))
            if receipt is None and row["kind"] == "duplicate" and row["reason"] == "duplicate_exact":
                sample = left.pop(row["id"], None)
                if sample is not None:
                    receipts[position_of(sample)] |= {"id": None, "duplicate_of": row["id"]}
                    row = {**sample, **{name: row[name] for name in CLAIM}}
            settled.append(receipt or row)
        return settled


def _sender(row: StoreRow) -> tuple[bytes | None, str]:
    return row["key"], row["source"] or ""
