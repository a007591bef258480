"""Refused records: looking at them, and sending them again as they came, once what refused them has been mended.

A record is named by its *place*, ``topic:partition:offset`` of where it was refused. It is read from the sample store,
which has every refused record with its bytes, and sent to the topic again with a header that tells where it was.

The place is claimed in the ledger before and settled after: a second call is refused. A process that dies in between
leaves the claim, and only ``force`` sends again. Whatever is sent twice all the same is found by ingest: equal samples
are stored once. Many records, chosen by reason, source and time, are each claimed like a single one. Records refused
again return to quarantine, as other records.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import pyarrow as pa

from core.errors import AlreadyResubmitted, BrokerError, ConfigError, RatchetError, RecordError, UnknownRecord
from core.ledger import Ledger, ResubmissionRow
from core.settings import Settings
from ratchet_client.broker import CONNECT_SECONDS
from ratchet_client.encoding import Encoded, Headers
from ratchet_client.producer import Delivery, RecordSender
from ratchet_client.records import REASONS
from streams.ingest.quarantine import original
from streams.kafka.clients import connection
from streams.store.rows import SCHEMA, position_of, refused
from streams.store.sample_store import SampleStore

PUBLISH_SECONDS: Final = 20.0
#: Header of a record that was sent again: the place where it was refused. Decoders pass it by: it is no field.
HEADER: Final = "x-ratchet-resubmission-of"
_PLACE: Final = re.compile(r"([^:]{1,260}):([0-9]{1,9}):([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class RefusedRecord:
    """A record in quarantine, without its bytes."""

    place: str
    reason: str
    """One of :data:`ratchet_client.records.REASONS`."""
    detail: str
    source: str
    """Who sent it, as far as its headers say."""
    refused_at: datetime
    resubmission: ResubmissionRow | None
    """The last time that it was sent again."""


def list_quarantine(
    settings: Settings, ledger: Ledger, limit: int = 50, reason: str | None = None, source: str | None = None
) -> list[RefusedRecord]:
    """The newest refused records, newest first; of a reason, of a source (empty: of none). Raises StoreError."""
    rows = SampleStore(settings.lake).refusals(limit, reason, source)
    places = [f"{row['topic']}:{row['partition']}:{row['offset']}" for row in rows]
    again = ledger.resubmissions(places)
    return [
        RefusedRecord(place, row["reason"], row["detail"], row["source"] or "", row["ingested_at"], again.get(place))
        for place, row in zip(places, rows, strict=True)
    ]


def quarantined(settings: Settings, place: str) -> Encoded:
    """A refused record as it came: key, value and headers. :func:`streams.records.codecs.glimpse` shows what is in it.

    Raises:
        UnknownRecord: nothing was refused there.
    """
    stream, partition, offset = _parse(place)
    row = SampleStore(settings.lake).refusal(stream, partition, offset)
    if row is None:
        raise UnknownRecord(f"no record was refused at {place[:300]}.", "See `GET /admin/v1/quarantine` for places.")
    return original(row)


def resubmit(
    settings: Settings, ledger: Ledger, place: str, *, actor: str, reason: str, force: bool = False
) -> Delivery:
    """Send a refused record to the topic again, and wait until the broker has it. Leaves an audit row.

    Raises:
        UnknownRecord: nothing was refused at the place.
        RecordError: the record has no value, so there is nothing to send.
        AlreadyResubmitted: it was sent again before, and ``force`` is not set.
        BrokerError: the broker did not take it; it may be tried again.
    """
    record = quarantined(settings, place)
    if not record.value:
        raise RecordError("empty", f"record {place} has no value.", "There is nothing to send again.")
    ledger.begin_resubmission(place, actor=actor, reason=reason, force=force)
    try:
        delivery = _send_one(settings, Encoded(record.key, record.value, _headers_of(record, place)))
    except RatchetError as error:
        ledger.end_resubmission(place, str(error))
        raise
    ledger.end_resubmission(place)
    return delivery


def _headers_of(record: Encoded, place: str) -> Headers:
    """The headers under which a refused record is sent again: its own, and where it was refused."""
    return [*((name, value) for name, value in record.headers if name != HEADER), (HEADER, place.encode())]


def _send_one(settings: Settings, record: Encoded) -> Delivery:
    sender = RecordSender(connection(settings.kafka), CONNECT_SECONDS, PUBLISH_SECONDS)
    try:
        sent = sender.send(settings.kafka.topic, record)
        sender.flush(PUBLISH_SECONDS)
        return sent.result(timeout=1)
    finally:
        sender.close(timeout=1.0)


def _parse(place: str) -> tuple[str, int, int]:
    match = _PLACE.fullmatch(place)
    if match is None:
        raise UnknownRecord(f"{place[:300]!r} is no place.", "A place reads topic:partition:offset.")
    return match[1], int(match[2]), int(match[3])


LIMIT: Final = 1000
MAX_LIMIT: Final = 100_000
PER_SECOND: Final = 50.0
CLAIMED_PER_QUERY: Final = 500
MAX_ERRORS: Final = 5
MAX_FAILURES: Final = 3
"""Failures in a row that end it: the broker is away, and each one waits for it."""
SENT: Final = 0
SOME_FAILED: Final = 3
_ORDER: Final = ("topic", "partition", "offset")


@dataclass(frozen=True, slots=True)
class RefusalFilter:
    """Which refused records, the oldest first. None: any.

    Raises:
        ConfigError: a reason that is none, or a limit out of bounds.
    """

    reason: str | None = None
    """One of :data:`ratchet_client.records.REASONS`."""
    source: str | None = None
    """As their headers name it; empty for those that name none."""
    since: datetime | None = None
    """Refused at or after this time."""
    limit: int = LIMIT
    """At most so many that were not sent again before."""

    def __post_init__(self) -> None:
        if self.reason is not None and self.reason not in REASONS:
            raise ConfigError(f"{self.reason[:80]!r} is no reason.", f"Reasons: {', '.join(sorted(REASONS))}.")
        if not 1 <= self.limit <= MAX_LIMIT:
            raise ConfigError(f"a limit of {self.limit} records is out of bounds.", f"Give 1 to {MAX_LIMIT}.")


@dataclass
class ResubmitReport:
    """What became of the refused records that a filter chose."""

    dry_run: bool = False
    chosen: int = 0
    """Records that pass the filter, and were not sent again before."""
    sent: int = 0
    """The broker has them."""
    before: int = 0
    """Records that pass the filter, and were sent again before, or are being sent by somebody else."""
    empty: int = 0
    """Records without a value: there is nothing to send."""
    failed: int = 0
    """The broker did not take them; they may be tried again."""
    failures: int = 0
    """Of these, those since the last record that was sent."""
    errors: list[str] = field(default_factory=list)
    """The first few reasons of these."""

    @property
    def exit_status(self) -> int:
        """0: all were sent (or none was left to send); 3: some were not."""
        return SOME_FAILED if self.failed or self.empty else SENT

    def as_json(self) -> dict[str, Any]:
        """The counts, and the first errors."""
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
    which: RefusalFilter,
    *,
    actor: str,
    reason: str,
    dry_run: bool = False,
    per_second: float = PER_SECOND,
    on_progress: Callable[[ResubmitReport], None] = lambda report: None,
) -> ResubmitReport:
    """Send refused records to the topic again, each once, and wait until the broker has it. Each leaves an audit row.

    What is refused while this runs is not looked at.

    Args:
        settings: broker, topic and store.
        ledger: has the claims.
        which: which records.
        actor: who does it.
        reason: why.
        dry_run: only count.
        per_second: at most so many, so that ingest has room for what comes besides.
        on_progress: called after each record.

    Raises:
        BrokerError: the broker does not answer (any more).
        StoreUnavailable, LedgerError: one of these does not.

    After any of them, what was sent so far stays sent, and is not sent by the next call.
    """
    store = SampleStore(settings.lake)
    report = ResubmitReport(dry_run)
    places = _choose(store, ledger, which, report)
    if dry_run or not places:
        return report
    pace = _Pace(per_second)
    with ExitStack() as stack:
        sender = RecordSender(connection(settings.kafka), CONNECT_SECONDS, PUBLISH_SECONDS)
        stack.callback(sender.close, timeout=1.0)
        for place in places:
            row = store.refusal(*place)
            if row is None:
                report.chosen -= 1  # deleted meanwhile
                continue
            record = original(row)
            if not record.value:
                report.empty += 1
            else:
                pace.wait()
                _send(sender, settings.kafka.topic, ledger, place, record, report, actor=actor, reason=reason)
            on_progress(report)
            if report.failures >= MAX_FAILURES:
                raise BrokerError(f"it ended early: {report}.", "Ask again when the broker answers.")
    return report


def _choose(
    store: SampleStore, ledger: Ledger, which: RefusalFilter, report: ResubmitReport
) -> list[tuple[str, int, int]]:
    """Positions of the records to send, the oldest first; counts into the report."""
    columns = [*_ORDER, "ingested_at"]
    schema = pa.schema([SCHEMA.field(name) for name in columns])
    batches = store.batches(refused(which.reason, which.source, which.since), columns)
    table = pa.Table.from_batches(batches, schema=schema)
    table = table.sort_by([(name, "ascending") for name in ("ingested_at", *_ORDER)]).select(_ORDER)
    chosen: list[tuple[str, int, int]] = []
    for batch in _chunks(table):
        names = [_name(place) for place in batch]
        again = ledger.resubmissions(names)
        for place, name in zip(batch, names, strict=True):
            if name in again and again[name].state != "failed":
                report.before += 1
            elif len(chosen) < which.limit:
                chosen.append(place)
        if len(chosen) >= which.limit:
            break
    report.chosen = len(chosen)
    return chosen


def _chunks(table: pa.Table) -> Iterator[Sequence[tuple[str, int, int]]]:
    for start in range(0, table.num_rows, CLAIMED_PER_QUERY):
        rows = table.slice(start, CLAIMED_PER_QUERY).to_pylist()
        yield [position_of(row) for row in rows]


def _send(
    sender: RecordSender,
    topic: str,
    ledger: Ledger,
    place: tuple[str, int, int],
    record: Encoded,
    report: ResubmitReport,
    **who: Any,
) -> None:
    name = _name(place)
    try:
        ledger.begin_resubmission(name, **who)
    except AlreadyResubmitted:  # somebody was faster
        report.chosen -= 1
        report.before += 1
        return
    try:
        sent = sender.send(topic, Encoded(record.key, record.value, _headers_of(record, name)))
        sent.result(timeout=PUBLISH_SECONDS + 5)
    except (BrokerError, TimeoutError) as error:
        ledger.end_resubmission(name, str(error) or "the broker did not answer in time.")
        report.failed, report.failures = report.failed + 1, report.failures + 1
        if len(report.errors) < MAX_ERRORS:
            report.errors.append(f"{name}: {error}")
        return
    ledger.end_resubmission(name)
    report.sent, report.failures = report.sent + 1, 0


def _name(place: tuple[str, int, int]) -> str:
    return ":".join(map(str, place))


class _Pace:
    """At most so many a second, one after another."""

    def __init__(self, per_second: float) -> None:
        self._seconds = 1.0 / max(per_second, 1e-3)
        self._next = 0.0

    def wait(self) -> None:
        now = time.monotonic()
        if self._next > now:
            time.sleep(self._next - now)
        self._next = max(now, self._next) + self._seconds
