"""The audit of a chaos run: was every record stored or quarantined exactly once?"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from benchmarks.stream.chaos_records import Made
from core.errors import StoreError
from core.settings.streams import Kafka
from streams.ingest.quarantine import original_position
from streams.store.rows import Position, RecordPosition
from streams.store.sample_store import SampleStore

QUIET_POLLS = 4
EVIDENCE = 20


@dataclass
class Audit:
    """Numbers of violations, and examples of them."""

    lost: int = 0
    """Records without a row, quarantined records that are not in the topic, missing samples, offsets in gaps."""
    double: int = 0
    """Rows of a record over one, rows of no record, sample rows of an ID over one."""
    quarantine_double: int = 0
    misjudged: int = 0
    """Bad records stored as samples, and good ones quarantined, except for those at which a process died three
    times."""
    crashed: int = 0
    """Good records quarantined because the process died three times while it validated them. Not a violation."""
    tally_wrong: int = 0
    """Kinds of rows whose stored number differs from the counted one."""
    evidence: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        if len(self.evidence) < EVIDENCE:
            self.evidence.append(text)


def audit(
    topic: str, places: Mapping[tuple[int, int], Made], store: SampleStore, messages: Iterable[RecordPosition]
) -> Audit:
    """Compare what was produced with the result, when nothing changes any more.

    Args:
        topic: the topic of all records.
        places: what was produced, by partition and offset.
        messages: of the quarantine topic: the position of the original of each.
    """
    result = Audit()
    rows = store.records().to_pylist()
    published = Counter(messages)
    by_place: dict[RecordPosition, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_place[row["topic"], row["partition"], row["offset"]].append(row)
        if row["kind"] == "gap":
            result.lost += row["until"] - row["offset"]
            result.note(f"gap: {row}")
    for (partition, offset), record in places.items():
        _audit_record(result, record, (topic, partition, offset), by_place, published)
    for place in by_place.keys() - {(topic, *each) for each in places}:
        result.double += len(by_place[place])
        result.note(f"rows of no record that was produced: {place} {by_place[place]}")
    _audit_ids(result, rows, places)
    for place, number in published.items():
        if number > 1:
            result.quarantine_double += number - 1
            result.note(f"{number} messages in the quarantine topic for {place}")
    counted, kept = Counter(row["kind"] for row in rows), store.tally()
    for kind in {"sample", "duplicate", "quarantine", "gap", "tombstone"}:
        if counted[kind] != kept[kind]:
            result.tally_wrong += 1
            result.note(f"{counted[kind]} rows of kind {kind}, but their number is kept as {kept[kind]}")
    return result


def _audit_record(
    result: Audit,
    record: Made,
    place: RecordPosition,
    by_place: Mapping[RecordPosition, list[dict[str, Any]]],
    published: Counter[RecordPosition],
) -> None:
    rows = by_place.get(place, [])
    if not rows:
        result.lost += 1
        result.note(f"no row of {place} ({record.kind})")
        return
    if len(rows) > 1:
        result.double += len(rows) - 1
        result.note(f"{len(rows)} rows of {place}: {rows}")
    row = rows[0]
    if row["kind"] == "quarantine" and not published[place]:
        result.lost += 1
        result.note(f"not in the quarantine topic: {place} ({row['reason']})")
    if row["kind"] == "quarantine" and row["reason"] == "crashed":
        result.crashed += record.kind == "good"
    elif (row["kind"] == "quarantine") != (record.kind == "bad"):
        result.misjudged += 1
        result.note(f"a {record.kind} record is a {row['kind']}: {row}")


def _audit_ids(result: Audit, rows: list[dict[str, Any]], places: Mapping[tuple[int, int], Made]) -> None:
    samples = Counter(row["id"] for row in rows if row["kind"] == "sample")
    for sample, number in samples.items():
        if number > 1:
            result.double += number - 1
            result.note(f"{number} samples with the id {sample}")
    accepted = {(row["partition"], row["offset"]) for row in rows if row["kind"] != "quarantine"}
    for place, record in places.items():
        if record.id and place in accepted and not samples[record.id]:
            result.lost += 1
            result.note(f"{place} is accounted for, but there is no sample {record.id}")


def quarantined(kafka: Kafka) -> list[RecordPosition]:
    """Positions of the originals of all messages in the quarantine topic, read as committed."""
    consumer = KafkaConsumer(
        bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest", isolation_level="read_committed", group_id=None
    )
    try:
        topic = kafka.quarantine_topic
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        places: list[RecordPosition] = []
        quiet = 0
        while quiet < QUIET_POLLS:
            records = [each for batch in consumer.poll(timeout_ms=500).values() for each in batch]
            quiet = 0 if records else quiet + 1
            places += [place for each in records if (place := original_position(each)) is not None]
        return places
    finally:
        consumer.close(timeout_ms=1000)


class OffsetWatch(threading.Thread):
    """Watches the positions during the run, and counts those that went backwards."""

    def __init__(self, store: SampleStore, every_seconds: float = 0.5) -> None:
        super().__init__(name="offsets", daemon=True)
        self.store = store
        self.backwards = 0
        self.evidence: list[str] = []
        self._every = every_seconds
        self._ended = threading.Event()
        self._last: dict[str, Position] = {}

    def run(self) -> None:
        while not self._ended.wait(self._every):
            try:
                self._look()
            except (StoreError, OSError):
                continue  # away, or full

    def end(self) -> None:
        self._ended.set()
        self.join()
        self._look()

    def _look(self) -> None:
        positions = self.store.positions()
        for key, old in self._last.items():
            new = positions.get(key)
            if new is None or new.next < old.next or new.published < old.published or new.epoch < old.epoch:
                self.backwards += 1
                self.evidence.append(f"{key} went from {old} to {new}")
        self._last = positions
