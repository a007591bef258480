"""Operator actions on single records: resubmit quarantined ones unchanged, and skip offsets.

A quarantined record is named by its *place*, the ``topic:partition:offset`` where it was quarantined. It is read from
the sample store, and sent to the topic again with a header that names the place. The place is claimed in the ledger
before and settled after: a second call is refused. A process that dies in between leaves the claim, and only ``force``
sends again. **Skipping** claims the partition like another worker, and moves its position in the commit that stores the
gap. The next commit of a worker on the partition fails, and it continues from the new position.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import pyarrow as pa
from kafka import TopicPartition

from core.errors import (
    AlreadyResubmitted,
    BrokerError,
    ConfigError,
    RatchetError,
    RecordError,
    SkipRefused,
    Superseded,
    UnknownRecord,
)
from core.ledger import Ledger, ResubmissionRow
from core.settings import Settings
from core.settings.streams import Kafka
from ratchet_client.encoding import Encoded, Headers
from ratchet_client.producer import Delivery, RecordSender
from ratchet_client.records import REASONS
from streams.ingest.membership import start_position
from streams.ingest.quarantine import original
from streams.kafka.clients import Admin, deliver, reading_alone, record_sender
from streams.store.conditions import quarantine_condition
from streams.store.rows import (
    SCHEMA,
    Position,
    RecordPosition,
    gap_row,
    name_of,
    parse_stream,
    position_of,
    read_position,
    tally_of,
)
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter

#: Header of a resubmitted record: the place where it was quarantined. Decoders ignore it.
HEADER: Final = "x-ratchet-resubmission-of"


@dataclass(frozen=True, slots=True)
class QuarantinedRecord:
    place: str
    reason: str
    """One of :data:`ratchet_client.records.REASONS`."""
    detail: str
    source: str
    refused_at: datetime
    resubmission: ResubmissionRow | None


def list_quarantine(
    settings: Settings, ledger: Ledger, limit: int = 50, reason: str | None = None, source: str | None = None
) -> list[QuarantinedRecord]:
    """The newest quarantined records, newest first, by reason and source (empty: none named). Raises StoreError."""
    rows = SampleStore(settings.lake).quarantined(limit, reason, source)
    places = [name_of(position_of(row)) for row in rows]
    again = ledger.resubmissions(places)
    return [
        QuarantinedRecord(
            place, row["reason"], row["detail"], row["source"] or "", row["ingested_at"], again.get(place)
        )
        for place, row in zip(places, rows, strict=True)
    ]


def quarantined(settings: Settings, place: str) -> Encoded:
    """A quarantined record as received: key, value and headers. Raises UnknownRecord if there is none at the place."""
    try:
        position = read_position(place)
    except RecordError:
        raise UnknownRecord(f"{place[:300]!r} is not a place.", "A place reads topic:partition:offset.") from None
    row = SampleStore(settings.lake).quarantined_record(*position)
    if row is None:
        raise UnknownRecord(f"no record was refused at {place[:300]}.", "See `GET /admin/v1/quarantine` for places.")
    return original(row)


def resubmit(
    settings: Settings, ledger: Ledger, place: str, *, actor: str, reason: str, force: bool = False
) -> Delivery:
    """Send a quarantined record to the topic again, and wait for the broker's acknowledgement. Leaves an audit row.
    Raises UnknownRecord if none is at the place; RecordError if it has no value to send; AlreadyResubmitted if it was
    resubmitted before, without ``force``; BrokerError if the broker did not take it: try again."""
    record = quarantined(settings, place)
    if not record.value:
        raise RecordError("empty", f"record {place} has no value.", "There is nothing to send again.")
    with (
        _claimed(ledger, place, actor=actor, reason=reason, force=force),
        closing(record_sender(settings.kafka)) as sender,
    ):
        return _deliver(sender, settings.kafka, place, record)


@contextmanager
def _claimed(ledger: Ledger, place: str, **who: Any) -> Iterator[None]:
    ledger.begin_resubmission(place, **who)
    try:
        yield
    except RatchetError as error:
        ledger.end_resubmission(place, str(error))
        raise
    ledger.end_resubmission(place)


def _deliver(sender: RecordSender, kafka: Kafka, place: str, record: Encoded) -> Delivery:
    """Send a record to the topic that it came from, or to the main one if that is not read any more."""
    came_from = parse_stream(place.rsplit(":", 2)[0])[0]
    topic = came_from if came_from in kafka.bound else kafka.topic
    headers: Headers = [*((name, value) for name, value in record.headers if name != HEADER), (HEADER, place.encode())]
    return deliver(sender, topic, Encoded(record.key, record.value, headers))


LIMIT: Final = 1000
MAX_LIMIT: Final = 100_000
PER_SECOND: Final = 50.0
CLAIMED_PER_QUERY: Final = 500
MAX_ERRORS: Final = 5
MAX_FAILURES: Final = 3

_ORDER: Final = ("topic", "partition", "offset")


@dataclass(frozen=True, slots=True)
class QuarantineFilter:
    """A choice of quarantined records, oldest first; None matches any. Raises ConfigError for an unknown reason, or a
    limit out of bounds."""

    reason: str | None = None
    source: str | None = None
    """As named in the headers; empty for those that name none."""
    since: datetime | None = None
    limit: int = LIMIT

    def __post_init__(self) -> None:
        if self.reason is not None and self.reason not in REASONS:
            raise ConfigError(f"{self.reason[:80]!r} is not a reason.", f"Reasons: {', '.join(sorted(REASONS))}.")
        if not 1 <= self.limit <= MAX_LIMIT:
            raise ConfigError(f"a limit of {self.limit} records is out of bounds.", f"Give 1 to {MAX_LIMIT}.")


@dataclass
class ResubmitReport:
    dry_run: bool = False
    chosen: int = 0
    """Matching records that were not resubmitted before."""
    sent: int = 0
    before: int = 0
    """Matching records that were resubmitted before, or are being resubmitted by another process."""
    empty: int = 0
    failed: int = 0
    """Records that the broker did not take; they may be tried again."""
    failures: int = 0
    errors: list[str] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0: all were sent (or none was left to send); 3: some were not."""
        return 3 if self.failed or self.empty else 0

    def as_json(self) -> dict[str, Any]:
        names = ("dry_run", "chosen", "sent", "before", "empty", "failed", "errors")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        if self.dry_run:
            return f"{self.chosen} records would be sent again; {self.before} were before"
        parts = [f"{self.sent} of {self.chosen} records were sent again"]
        parts += [f"{self.before} were before"] if self.before else []
        parts += [f"{self.empty} have no value"] if self.empty else []
        parts += [f"{self.failed} failed: {'; '.join(self.errors)}"] if self.failed else []
        return "; ".join(parts)


def resubmit_many(
    settings: Settings,
    ledger: Ledger,
    which: QuarantineFilter,
    *,
    actor: str,
    reason: str,
    dry_run: bool = False,
    per_second: float = PER_SECOND,
    on_progress: Callable[[ResubmitReport], None] = lambda report: None,
) -> ResubmitReport:
    """Resubmit quarantined records, each once with an audit row, and wait for the broker's acknowledgements. Records
    quarantined meanwhile are not included. ``per_second`` leaves ingest room for other records; ``dry_run`` only
    counts. Raises BrokerError, StoreUnavailable or LedgerError; the next call does not send again what was sent before.
    """
    store = SampleStore(settings.lake)
    report = ResubmitReport(dry_run)
    places = _choose(store, ledger, which, report)
    if dry_run or not places:
        return report
    next_at = 0.0
    with closing(record_sender(settings.kafka)) as sender:
        for place in places:
            row = store.quarantined_record(*place)
            if row is None:
                report.chosen -= 1  # deleted meanwhile
                continue
            record, name = original(row), name_of(place)
            if not record.value:
                report.empty += 1
                continue
            now = time.monotonic()
            time.sleep(max(0.0, next_at - now))
            next_at = max(now, next_at) + 1.0 / max(per_second, 1e-3)
            try:
                with _claimed(ledger, name, actor=actor, reason=reason):
                    _deliver(sender, settings.kafka, name, record)
            except AlreadyResubmitted:  # another process was faster
                report.chosen, report.before = report.chosen - 1, report.before + 1
            except BrokerError as error:
                report.failed, report.failures = report.failed + 1, report.failures + 1
                report.errors = [*report.errors, f"{name}: {error}"][:MAX_ERRORS]
            else:
                report.sent, report.failures = report.sent + 1, 0
            on_progress(report)
            if report.failures >= MAX_FAILURES:
                raise BrokerError(f"it ended early: {report}.", "Ask again when the broker answers.")
    return report


def _choose(
    store: SampleStore, ledger: Ledger, which: QuarantineFilter, report: ResubmitReport
) -> list[RecordPosition]:
    columns = [*_ORDER, "ingested_at"]
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    batches = store.batches(quarantine_condition(which.reason, which.source, which.since), columns)
    table = pa.Table.from_batches(batches, schema=schema)
    table = table.sort_by([(name, "ascending") for name in ("ingested_at", *_ORDER)]).select(_ORDER)
    chosen: list[RecordPosition] = []
    for rows in table.to_batches(max_chunksize=CLAIMED_PER_QUERY):
        batch = [position_of(row) for row in rows.to_pylist()]
        again = ledger.resubmissions([name_of(place) for place in batch])
        for place in batch:
            known = again.get(name_of(place))
            if known is not None and known.state != "failed":
                report.before += 1
            elif len(chosen) < which.limit:
                chosen.append(place)
        if len(chosen) >= which.limit:
            break
    report.chosen = len(chosen)
    return chosen


# -- skipping -----------------------------------------------------------------------------------------------------

ATTEMPTS: Final = 5
"""A worker may claim the partition between our claim and our commit."""
_PARTITION: Final = re.compile(r"([^:]{1,260}):([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Skipped:
    stream: str
    partition: int
    start: int
    until: int


def skip(settings: Settings, ledger: Ledger, partition: str, to: int, *, actor: str, reason: str) -> Skipped:
    """Continue a partition (``topic:partition``) at offset ``to``, and record the offsets before it as a gap with the
    reason ``skipped``. The audit row comes first.

    Raises:
        RecordError: ``partition`` is malformed, or of another topic than ingest reads.
        SkipRefused: the partition has been read further already, or its log ends before ``to``.
        BrokerError, StoreUnavailable: nothing was skipped.
    """
    match = _PARTITION.fullmatch(partition)
    if match is None:
        raise RecordError("position", f"{partition[:300]!r} is not a partition.", "It reads topic:partition.")
    try:
        kafka = settings.kafka.reading(match[1])
    except KeyError:
        reads = f"ingest reads the topic {settings.kafka.topic}, not {match[1]}."
        raise RecordError("position", reads, "See `kafka.topic` and `kafka.topics`.") from None
    number = int(match[2])
    topic_id, first, end = _describe(kafka, number)
    store = SampleStore(settings.lake)
    writer = StoreWriter(store.table)
    known = store.positions().values()
    start = start_position(known, kafka.topic, topic_id, number, first)
    _check(start, to, end)  # before a worker is disturbed
    subject = f"partition {partition}"
    ledger.audit(actor, "skip", subject, {"reason": reason, "stream": start.stream, "from": start.next, "to": to})
    try:
        for _ in range(ATTEMPTS):
            try:
                return _move(writer, start, to, end, f"{actor}: {reason}")
            except Superseded:
                continue
        raise SkipRefused(f"{partition} is claimed by others all the time.", "Stop the workers that fight over it.")
    except RatchetError as error:
        ledger.audit(actor, "skip failed", subject, {"error": str(error)[:1000]})
        raise


def _move(writer: StoreWriter, start: Position, to: int, end: int, why: str) -> Skipped:
    [claim] = writer.claim([start])
    position = claim.position
    _check(position, to, end)
    row = gap_row(position.stream, position.partition, position.next, to, "skipped", f"skipped by {why}")
    # `published` stays: the next owner publishes earlier quarantined records that are not in their topic yet.
    moved = replace(position, next=to, leader_epoch=-1, tally=position.tally + tally_of([row]))
    writer.commit([row], [(claim, moved)])
    return Skipped(position.stream, position.partition, position.next, to)


def _check(position: Position, to: int, end: int) -> None:
    if to <= position.next:
        raise SkipRefused(
            f"{position.key} has been read up to offset {position.next} already.", "Name a later offset: what was read"
            " stays as it is.",
        )  # fmt: skip
    if to > end:
        raise SkipRefused(f"the log of {position.key} ends at offset {end}.", f"Name at most {end}.")


def _describe(kafka: Kafka, number: int) -> tuple[str, int, int]:
    """The topic's ID, and the first and the end offset of a partition's log. Raises BrokerError if the broker does not
    answer, SkipRefused if there is no such partition."""
    with closing(Admin(kafka)) as admin:
        topic_id = admin.topic_id(kafka.topic)
    if topic_id is None:
        raise SkipRefused(f"there is no topic {kafka.topic}.", "See `kafka.topic` and `kafka.bootstrap`.")
    partition = TopicPartition(kafka.topic, number)
    with reading_alone(kafka, "looking at the log") as consumer:
        if number not in (consumer.partitions_for_topic(kafka.topic) or ()):
            raise SkipRefused(f"topic {kafka.topic} has no partition {number}.", "Partitions count from 0.")
        [first] = consumer.beginning_offsets([partition]).values()
        [end] = consumer.end_offsets([partition]).values()
    return topic_id, first, end
