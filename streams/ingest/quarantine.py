"""The quarantine topic: every quarantined record unchanged, with its original key, value and headers, and the headers
``ratchet_reason`` (one of ratchet_client.records.REASONS), ``ratchet_detail`` (in words), ``ratchet_topic``,
``ratchet_partition`` and ``ratchet_offset`` (of the original; topic@n: n-th log of that name), ``ratchet_refused_at``
(UTC, ISO 8601) and ``ratchet_null_headers``: a JSON list of the names of its headers without a value, which
kafka-python does not write. A record too large for the topic becomes a *claim check* without the original's key, value
and headers, which stay in the sample store at the position in ``ratchet_claim_check``.

A thread publishes them, so that the topic never delays reading. Each is published once: its row is stored in its
batch's commit, and :mod:`streams.kafka.outbox` finds what the topic lacks. Rows wait in memory up to a bound; beyond it
they are read from the store.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from core import metrics
from core.dependencies import answered, noted
from core.errors import BrokerError, Fenced, RecordTooLarge, StoreError
from ratchet_client.encoding import Encoded, Headers
from streams.ingest.membership import IngestClients, PartitionReader
from streams.kafka.outbox import Outbox, OutboxEntry
from streams.store.rows import Position, RecordPosition, name_of, position_of
from streams.store.sample_store import SampleStore

log = logging.getLogger(__name__)
QuarantineRow = Mapping[str, Any]


def message(row: QuarantineRow) -> Encoded:
    record = original(row)
    # Brokers accept a record with neither key nor value; the client does not send one.
    value = b"" if record.value is None and record.key is None else record.value
    nulls = [name for name, value in json.loads(row["original_headers"]) if value is None]
    named: Headers = [("ratchet_null_headers", json.dumps(nulls).encode())] if nulls else []
    return Encoded(record.key, value, [*record.headers, *_headers(row), *named])


def claim_check(row: QuarantineRow) -> Encoded:
    size = len(row["original"] or b"")
    text = json.dumps({"record": name_of(position_of(row)), "reason": row["reason"], "bytes": size})
    check = ("ratchet_claim_check", name_of(position_of(row)).encode())
    return Encoded(None, text.encode(), [*_headers(row), check])


def original(row: QuarantineRow) -> Encoded:
    """A quarantined record as received, without its null headers, which ingest ignores."""
    headers = [
        (name, base64.b64decode(value)) for name, value in json.loads(row["original_headers"]) if value is not None
    ]
    return Encoded(row["original_key"], row["original"], headers)


def original_position(record: Any) -> RecordPosition | None:
    """The position of a message's original; None for foreign messages."""
    headers = dict(record.headers)
    try:
        stream = headers["ratchet_topic"].decode()
        return stream, int(headers["ratchet_partition"]), int(headers["ratchet_offset"])
    except (KeyError, ValueError, AttributeError):
        return None


def _headers(row: QuarantineRow) -> Headers:
    refused_at: datetime = row["ingested_at"]
    ours = {name: str(row[name]) for name in ("reason", "detail", "topic", "partition", "offset")}
    ours["refused_at"] = refused_at.isoformat()
    return [(f"ratchet_{name}", text.encode()) for name, text in ours.items()]


MEMORY_BYTES: Final = 32 << 20
PAGE_ROWS: Final = 64
BACKOFF_SECONDS: Final = (0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass
class _Job:
    reading: PartitionReader
    start: int
    end: int
    rows: list[QuarantineRow] | None
    """None: they are only in the store."""
    size: int = 0
    page: int = PAGE_ROWS
    oversized: int = -1


class QuarantinePublisher:
    """A publishing thread with a queue. The consumer's loop calls everything except :meth:`_run`."""

    def __init__(self, clients: IngestClients, store: SampleStore) -> None:
        self.clients = clients
        self.store = store
        self._jobs: deque[_Job] = deque()
        self._outboxes: dict[str, tuple[PartitionReader, Outbox]] = {}
        """By partition key: the outbox of its newest reader that has one."""
        self._bytes = 0
        self._changed = threading.Condition()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="quarantine", daemon=True)
        self._thread.start()

    def recover(self, reading: PartitionReader) -> None:
        position = reading.claim.position
        if position.published < position.next:
            self._queue(_Job(reading, position.published, position.next, None))

    def publish(self, reading: PartitionReader, rows: Sequence[QuarantineRow]) -> None:
        if rows:
            size = sum(len(row["original"] or b"") + 1024 for row in rows)
            held = list(rows) if self._bytes + size <= MEMORY_BYTES else None
            offsets = [int(row["offset"]) for row in rows]
            self._queue(_Job(reading, min(offsets), max(offsets) + 1, held, size if held is not None else 0))

    def unpublished(self, reading: PartitionReader) -> int | None:
        with self._changed:
            return next((job.start for job in self._jobs if job.reading is reading), None)

    def wait_until_published(self, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs, seconds)

    def close(self) -> None:
        """End the thread. Waiting records are in the store, and the next owner publishes them."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join(5.0)

    def _queue(self, job: _Job) -> None:
        with self._changed:
            last = self._jobs[-1] if len(self._jobs) > 1 else None
            if last is not None and last.rows is None and job.rows is None and last.reading is job.reading:
                last.end = job.end
            else:
                self._jobs.append(job)
            self._bytes += job.size
            self._changed.notify_all()

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._ending)
                if self._ending:
                    break
                job = self._jobs[0]
            try:
                self._publish_or_change(job)
                if failures:
                    answered(["broker"])
                failures = 0
                metrics.ingest.quarantine_failing(False)
            except Exception as error:
                failures += 1
                self._later(job, error, failures)
        for _, outbox in self._outboxes.values():
            outbox.close()

    def _publish_or_change(self, job: _Job) -> None:
        """Publish a job's first page, or change the job so that the next attempt succeeds."""
        try:
            self._publish(job)
        except Fenced:
            if not self._owns(job.reading):
                self._forget(job.reading)
            # otherwise a former owner resumed and opened its sender: ours is reopened, and fences it
        except RecordTooLarge:
            if job.page > 1:
                job.page = 1  # sending one by one shows which record it is
            elif job.oversized != job.start:
                job.oversized = job.start
            else:
                raise  # even a claim check is too large

    def _later(self, job: _Job, error: Exception, failures: int) -> None:
        metrics.ingest.quarantine_failing(True)
        noted(error)
        key, known = job.reading.claim.key, isinstance(error, (BrokerError, StoreError))
        log.warning("quarantined records of %s are published later: %s", key, error, exc_info=None if known else error)
        with self._changed:
            self._changed.wait_for(lambda: self._ending, BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1])

    def _publish(self, job: _Job) -> None:
        rows = job.rows[: job.page] if job.rows is not None else self._from_store(job)
        outbox = self._outbox(job.reading)
        entries = [_entry(row, job.page == 1 and job.oversized in (job.start, row["offset"])) for row in rows]
        try:
            outbox.publish(entries)
        except BaseException:
            outbox.close()
            raise
        outbox.forget(entry.id for entry in entries)
        end = int(rows[-1]["offset"]) + 1 if rows else job.end
        with self._changed:
            job.start = end
            if job.rows is not None:
                job.rows = job.rows[len(rows) :]
            if end >= job.end or not rows:
                self._bytes -= job.size
                self._jobs.popleft()
                self._changed.notify_all()

    def _from_store(self, job: _Job) -> list[QuarantineRow]:
        position = job.reading.claim.position
        part = Position(position.stream, position.partition, job.end, published=job.start)
        return list(self.store.outbox(part, job.page))

    def _outbox(self, reading: PartitionReader) -> Outbox:
        known = self._outboxes.get(reading.claim.key)
        if known is not None and known[0] is reading:
            return known[1]
        if known is not None:
            known[1].close()
        store, _ = self.store.table.identity()
        name = f"ratchet-quarantine:{store}:{reading.claim.key}"
        sender = self.clients.sender(name, lambda: self._owns(reading))
        outbox = Outbox(self.clients.kafka.quarantine_topic, sender, _id_of)
        self._outboxes[reading.claim.key] = (reading, outbox)
        return outbox

    def _owns(self, reading: PartitionReader) -> bool:
        """False if another process has claimed the partition since."""
        newest = self.store.positions().get(reading.claim.key)
        return newest is not None and newest.epoch == reading.claim.position.epoch

    def _forget(self, reading: PartitionReader) -> None:
        with self._changed:
            self._bytes -= sum(job.size for job in self._jobs if job.reading is reading)
            self._jobs = deque(job for job in self._jobs if job.reading is not reading)
            self._changed.notify_all()
        known = self._outboxes.get(reading.claim.key)
        if known is not None and known[0] is reading:
            del self._outboxes[reading.claim.key]
            known[1].close()


def _entry(row: QuarantineRow, oversized: bool) -> OutboxEntry:
    record: Encoded = claim_check(row) if oversized else message(row)
    return OutboxEntry(name_of(position_of(row)), record, row["ingested_at"])


def _id_of(record: Any) -> str | None:
    position = original_position(record)
    return None if position is None else name_of(position)
