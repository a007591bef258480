"""The records between two commits."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from core import metrics
from core.errors import StoreError, StoreUnavailable
from core.settings.streams import Kafka
from streams.ingest.assignment import Reading
from streams.ingest.corrections import Corrections, is_newer
from streams.ingest.quality.duplicates import Duplicate, DuplicateIndex, Sample
from streams.ingest.quality.validate import Accepted, StoreRow, refuse
from streams.store.rows import SCHEMA, Position, RecordPosition, duplicate_row, name_of, position_of, tally_of
from streams.store.writer import StoreWriter

log = logging.getLogger(__name__)
Entry = tuple[Reading, int, Accepted | StoreRow, int]
"""Under which reading; the first offset behind it; the sample, or the row of what is none; bytes."""
Watermark = Callable[[Reading], int | None]
"""Offset of a reading's first refusal that is not published yet, or None where there is none."""


@dataclass
class CommitResult:
    """What became of the records of a batch."""

    version: int = 0
    """The store's version that holds them."""
    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """By kind."""
    corrected: int = 0
    """Samples that records of it replaced."""
    rows: list[StoreRow] = field(default_factory=list)
    """What was stored."""
    readings: list[Reading] = field(default_factory=list)
    records: int = 0
    size: int = 0
    """Bytes of the records."""

    def of_kind(self, kind: str) -> list[StoreRow]:
        """The rows of one kind."""
        return [row for row in self.rows if row["kind"] == kind]


class Batch:
    """Validated records that wait for their commit."""

    def __init__(self, kafka: Kafka, writer: StoreWriter, index: DuplicateIndex) -> None:
        self.kafka = kafka
        self.writer = writer
        self.index = index
        self._entries: list[Entry] = []
        self._readings: set[Reading] = set()
        self._bytes = 0
        self._since = 0.0
        self._doubles: list[tuple[str, RecordPosition]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, reading: Reading, end: int, result: Accepted | StoreRow, size: int) -> None:
        """Take in a record of ``size`` bytes, behind which the next one to read is ``end``."""
        if not self._entries:
            self._since = time.monotonic()
        self._entries.append((reading, end, result, size))
        self._readings.add(reading)
        self._bytes += size

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        return bool(self._entries) and (
            len(self._entries) >= self.kafka.batch_records
            or self._bytes >= self.kafka.batch_bytes
            or self.seconds_left <= 0
        )

    @property
    def seconds_left(self) -> float:
        """Until a commit is due; infinite when there is nothing to commit."""
        if not self._entries:
            return float("inf")
        return self._since + self.kafka.batch_seconds - time.monotonic()

    def drop(self, holds: Callable[[Reading], bool]) -> None:
        """Forget what was read under readings that do not hold any more: others read it again."""
        lost = {reading for reading in self._readings if not holds(reading)}
        if lost:
            self._readings -= lost
            self._entries = [entry for entry in self._entries if entry[0] not in lost]
            self._bytes = sum(size for *_, size in self._entries)

    def commit(self, watermark: Watermark) -> CommitResult:
        """Store all of it in one commit, and empty the batch.

        Raises:
            Superseded: another process has claimed partitions of it; nothing was stored. To be tried again without
                them (:meth:`drop`).
            StoreUnavailable: nothing was stored; to be tried again.
        """
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
                if not outcome.corrected:  # else it is read again: samples may have passed to other records
                    self.index.stored(outcome.version, max(reading.claim.fragment for reading in ends))
        except StoreUnavailable as error:
            if not outcome.version:
                raise
            log.warning("the batch is stored; the duplicate index takes it from the store later: %s", error)
        except (TypeError, ValueError, OverflowError):
            if not self._refuse_misfits():
                raise
            return self.commit(watermark)
        self._entries, self._readings, self._bytes = [], set(), 0
        self._settle_doubles()
        return outcome

    def _refuse_misfits(self) -> bool:
        """Refuse samples that passed validation and that the table cannot hold; whether there are any.

        None is known. But one would otherwise be read again for ever, and stop its partition.
        """
        misfits = 0
        for number, (reading, end, result, size) in enumerate(self._entries):
            if isinstance(result, Accepted) and result.record is not None and (problem := _misfit(result.row)):
                log.error("record %s:%d is valid and cannot be stored: %s", reading.claim.key, end - 1, problem)
                self._entries[number] = (reading, end, refuse(result.record, "internal", problem), size)
                misfits += 1
        return misfits > 0

    def _settle_doubles(self) -> None:
        """Never fails a batch that is stored: what cannot be settled now is with the next one."""
        self._doubles += self.index.settled()
        try:
            while self._doubles:
                settled = self.writer.settle_double(*self._doubles[0])
                metrics.ingest.settled(int(settled))
                del self._doubles[0]
        except StoreError as error:
            log.warning("a sample that two workers stored is made a duplicate later: %s", error)

    def _decide(self, outcome: CommitResult) -> dict[RecordPosition, StoreRow]:
        """Sort out the rows to store: samples, as duplicates those that repeat the store or this batch, others as they
        are. Returns the receipts of stored samples that they replace.
        """
        accepted = [result for _, _, result, _ in self._entries if isinstance(result, Accepted)]
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
        sample = Sample(
            bytes.fromhex(row["id"]), position, row["look"], row["words"], row["domain"], bool(row["question"]),
            row["sent_at"],
        )  # fmt: skip
        same = next((each for each in targets if each["id"] == row["id"]), None)
        newer = next((each for each in targets if is_newer(each, row)), None)
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
            row = {**row, "split": self.index.add(sample)}
        else:
            row = {**row, "split": same["split"]}
            self.index.move(row["id"], position)
        corrections.add(row)
        outcome.samples[row["split"]] += 1
        return row


def _misfit(row: StoreRow) -> str:
    """Why the table cannot hold a row, or empty."""
    try:
        pa.Table.from_pylist([row], schema=SCHEMA)
    except (TypeError, ValueError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _position(reading: Reading, behind: tuple[int, int], rows: list[StoreRow], unpublished: int | None) -> Position:
    """Where the partition stands behind the batch. Refusals are published after it."""
    position, (end, epoch) = reading.claim.position, behind
    own = [row for row in rows if _is_of(row, position)]
    first = min((row["offset"] for row in own if row["kind"] == "quarantine"), default=end)
    published = min(end, first, end if unpublished is None else unpublished)
    return replace(position, next=end, published=published, tally=position.tally + tally_of(own), leader_epoch=epoch)


def _is_of(row: Mapping[str, Any], position: Position) -> bool:
    return bool(row["topic"] == position.stream and row["partition"] == position.partition)
