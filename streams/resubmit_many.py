"""Sending many refused records again: by reason, source and time.

Each is claimed in the ledger like a single one (:mod:`streams.resubmit`), so that it is sent once, whoever asks and how
often. What is refused again lies in quarantine anew, and is another record.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import pyarrow as pa

from core.errors import AlreadyResubmitted, BrokerError, ConfigError
from core.ledger import Ledger
from core.settings import Settings
from ratchet_client.broker import CONNECT_SECONDS
from ratchet_client.encoding import Encoded
from ratchet_client.producer import RecordSender
from ratchet_client.records import REASONS
from streams.clients import connection
from streams.conditions import refused
from streams.quarantine import original
from streams.resubmit import PUBLISH_SECONDS, headers_of
from streams.rows import SCHEMA, position_of
from streams.store import SampleStore

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
        sent = sender.send(topic, Encoded(record.key, record.value, headers_of(record, name)))
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
