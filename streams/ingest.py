"""From the topic into the sample store.

One batch after another: read, judge, store samples and offsets in one commit, publish the refusals, and only then tell
Kafka. What Kafka remembers is for others to look at (lag); where to go on is read from the store. Killed at any
instant, every record is in the store or in the quarantine topic exactly once.

A *session* is one connection: when the broker goes away, the log is lost or another process takes over, the session
ends, what it had read is stored if it still may be, and the next one starts from what the store says.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import KafkaError, OffsetOutOfRangeError

from ops import metrics
from ops.errors import BrokerError
from ops.progress import say
from ops.settings import Settings
from streams.assignment import Assignment, Cursor, next_generation
from streams.batch import Batch, Outcome, Superseded
from streams.clients import MAX_RECORD_BYTES, Admin, client_options, explain
from streams.quality.duplicates import StoredLooks
from streams.quality.judge import Received, judge
from streams.quarantine import Quarantine
from streams.rows import Position, Snapshot, parse_stream
from streams.store import SampleStore

log = logging.getLogger(__name__)
POLL_SECONDS = 0.25
#: Records of one poll: they wait in memory while those before them are judged and committed.
POLL_RECORDS = 64
#: How often the topic is looked at while no records come, which is also how soon a lost broker is noticed.
WATCH_SECONDS = 2.0
CONNECT_SECONDS = 3.0
BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)
#: A process that was killed is noticed after this long, and its partitions go to another.
SESSION_SECONDS = 10.0
COMPACT_FRAGMENTS = 64


class LogLost(BrokerError):
    """The topic is not the one that this session has been reading."""


@dataclass(frozen=True, slots=True)
class IngestStatus:
    """Where ingest stands."""

    state: str = "starting"
    """``starting``, ``reading``, ``waiting`` (for the broker) or ``stopped``."""
    samples: int = 0
    duplicates: int = 0
    quarantined: int = 0
    commits: int = 0
    version: int = 0
    lag: int | None = None
    """Records between the store and the end of the log; None until it is known."""
    offsets: dict[str, int] = field(default_factory=dict)
    problem: str = ""


class Ingest:
    """Reads the topic until :meth:`stop`.

    >>> ingest = Ingest(settings)
    >>> threading.Thread(target=ingest.run).start()
    >>> ingest.status.samples
    """

    def __init__(
        self,
        settings: Settings,
        store: SampleStore | None = None,
        on_change: Callable[[IngestStatus], None] | None = None,
    ) -> None:
        """``on_change`` is called with the status after every commit and change of state."""
        self.settings = settings
        self.kafka = settings.kafka
        self.store = store or SampleStore(settings.lake)
        self.status = IngestStatus()
        self._on_change = on_change
        self._stop = threading.Event()
        self._looks = StoredLooks(self.store, settings.ingest.near_duplicate_distance)
        self._quarantine = Quarantine(self.kafka)

    def stop(self) -> None:
        """Ask :meth:`run` to store what it has read, and return. From any thread or a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Read until :meth:`stop`; a broker that is away is waited for.

        Raises:
            StoreError: the store cannot be written: nothing is lost, and nothing can go on.
            ConfigError: an option of the Kafka client is wrong.
        """
        failures = 0
        while not self._stop.is_set():
            before = self.status.commits
            try:
                _Session(self).run()
            except Superseded as error:
                log.warning("%s", error)
            except LogLost as error:
                say(f"ingest: [yellow]{error}[/yellow]")
            except BrokerError as error:
                failures = 1 if self.status.commits > before else failures + 1
                metrics.ingest.broker(False)
                self._change(state="waiting", problem=str(error))
                wait = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS)) - 1]
                say(f"ingest: [yellow]{error}[/yellow] Trying again in {wait:.0f} s.")
                self._stop.wait(wait)
        self._quarantine.close()
        self._change(state="stopped")

    def _change(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)
        if self._on_change is not None:
            self._on_change(self.status)

    def _stored(self, outcome: Outcome) -> None:
        """Count a commit, in the metrics and in the status."""
        for split, count in outcome.samples.items():
            metrics.ingest.stored(count, split)
        for kind, count in outcome.duplicates.items():
            for _ in range(count):
                metrics.ingest.duplicate(kind)
        for row in outcome.refused:
            metrics.ingest.refused(row["reason"])
        now = self.status
        self._change(
            state="reading",
            problem="",
            samples=now.samples + outcome.samples.total(),
            duplicates=now.duplicates + outcome.duplicates.total(),
            quarantined=now.quarantined + len(outcome.refused),
            commits=now.commits + 1,
            version=outcome.version,
            offsets={**now.offsets, **{cursor.key: cursor.next for cursor in outcome.cursors}},
        )


class _Session:
    """One connection to the broker."""

    def __init__(self, ingest: Ingest) -> None:
        self.ingest = ingest
        self.kafka = ingest.kafka
        self.store = ingest.store
        self.batch = Batch(self.kafka, ingest._looks)
        self.admin = Admin(self.kafka, CONNECT_SECONDS)
        self.consumer: Any = None
        self.assignment: Assignment
        self.topic_id = ""
        self._looked_at = 0.0

    def run(self) -> None:
        try:
            self._connect()
            while not self.ingest._stop.is_set():
                self._turn()
            self._commit()
        except (BrokerError, KafkaError, OSError) as error:
            self._salvage()
            if isinstance(error, BrokerError):
                raise
            raise explain(error, self.kafka, "reading") from error
        finally:
            if self.consumer is not None:
                self.consumer.close(autocommit=False, timeout_ms=2000)
            self.admin.close()

    def _connect(self) -> None:
        self.admin.ensure_topics([self.kafka.topic], self.kafka.partitions)
        self.admin.ensure_topics([self.kafka.quarantine_topic])
        self.topic_id = self.admin.topic_id(self.kafka.topic) or ""
        bounds = {
            "group_id": self.kafka.group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",  # the store knows where to go on; Kafka must not guess
            "bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000),
            "session_timeout_ms": int(SESSION_SECONDS * 1000),
            "reconnect_backoff_max_ms": 1000,
            "max_poll_records": POLL_RECORDS,
            "fetch_max_bytes": self.kafka.batch_bytes,
            "max_partition_fetch_bytes": max(1, self.kafka.batch_bytes // 2),
            "receive_message_max_bytes": MAX_RECORD_BYTES + self.kafka.batch_bytes,
        }
        self.consumer = KafkaConsumer(**{**bounds, **client_options(self.kafka, KafkaConsumer.DEFAULT_CONFIG)})
        self.assignment = Assignment(self.consumer, self.store, self.kafka.topic, self.topic_id)
        self.consumer.subscribe([self.kafka.topic], listener=self.assignment)
        self._looked_at = time.monotonic()

    def _turn(self) -> None:
        """One poll, and a commit when it is due."""
        wait = max(0.0, min(POLL_SECONDS, self.batch.seconds_left))
        try:
            polled = self.consumer.poll(timeout_ms=int(wait * 1000))
        except OffsetOutOfRangeError:
            self._find_range()
            return
        if polled or time.monotonic() - self._looked_at > WATCH_SECONDS:
            self._look()
        self._recover()
        for record in (each for records in polled.values() for each in records):
            self._take(record)
        if self.batch.due:
            self._commit()

    def _look(self) -> None:
        """Make sure that what was just polled is from the log that this session reads.

        Asked after each poll (0.5 ms): a log cannot come back, so if the topic still has its id now, it had it then.

        Raises:
            LogLost, BrokerError
        """
        found = self.admin.topic_id(self.kafka.topic)
        self._looked_at = time.monotonic()
        if found != self.topic_id:
            raise LogLost(
                f"topic {self.kafka.topic} has lost its log (its id was {self.topic_id}, is {found or 'gone'}).",
                "The new one is read from its beginning.",
            )
        metrics.ingest.broker(True)
        if self.ingest.status.state != "reading":
            self.ingest._change(state="reading", problem="")

    def _recover(self) -> None:
        """Publish what an earlier life stored as refused and may not have published."""
        cursors = [each for each in self.assignment.all() if not each.recovered]
        if not cursors:
            return
        ours = {each.partition for each in cursors}
        positions = [
            each
            for each in self.store.snapshot().positions.values()
            if each.partition in ours and parse_stream(each.stream)[0] == self.kafka.topic
        ]
        waiting = {each.key: self.store.outbox(each) for each in positions if each.published < each.next}
        rows = [row for key in waiting for row in waiting[key]]
        if rows:
            self.ingest._quarantine.recover(rows)
            self._mark_published([each for each in positions if waiting.get(each.key)])
        for cursor in cursors:
            cursor.published = max(cursor.published, cursor.stored or 0)
            cursor.recovered = True
            log.info("reading %s from %s", cursor.key, "its beginning" if cursor.stored is None else cursor.stored)

    def _mark_published(self, positions: list[Position]) -> None:
        """Remember that what was refused before ``positions`` is in the quarantine topic."""

        def build(snapshot: Snapshot) -> tuple[list[dict[str, Any]], list[Position]]:
            now = snapshot.positions
            return [], [replace(now[each.key], published=max(each.next, now[each.key].published)) for each in positions]

        self.store.commit(build)

    def _take(self, record: Any) -> None:
        cursor = self.assignment.cursor(record.partition)
        if cursor is None or record.offset < cursor.next:
            return  # not ours any more, or taken in before
        received = Received(
            cursor.stream,
            record.partition,
            record.offset,
            record.value,
            record.key,
            record.headers,
            datetime.fromtimestamp(record.timestamp / 1000, UTC) if record.timestamp > 0 else None,
        )
        if not self.batch.fits(received.size):
            self._commit()
        self.batch.add(cursor, judge(received, self.ingest.settings.ingest), received.size)
        cursor.next = record.offset + 1
        if self.batch.due:
            self._commit()

    def _commit(self) -> None:
        """Store the batch, publish its refusals, tell Kafka: in this order."""
        if not len(self.batch):
            return
        started = time.monotonic()
        outcome = self.batch.commit(self.store, self.assignment.holds)
        metrics.ingest.committed(time.monotonic() - started)
        if not outcome.cursors:
            return
        self.ingest._stored(outcome)
        self.ingest._quarantine.publish(outcome.refused)
        for cursor in outcome.cursors:
            cursor.published = max(cursor.published, cursor.stored or 0)
        self._tell_kafka(outcome.cursors)
        self._tend_store(outcome.cursors)

    def _tell_kafka(self, cursors: list[Cursor]) -> None:
        topic = self.kafka.topic
        offsets = {TopicPartition(topic, each.partition): OffsetAndMetadata(each.next, "", -1) for each in cursors}
        try:
            self.consumer.commit(offsets, timeout_ms=5000)
            ends = self.consumer.end_offsets(list(offsets))
        except KafkaError as error:  # a rebalance, or a broker that is away: the store is what counts
            log.info("offsets were stored, and could not be told to Kafka: %s", error)
            return
        lags: Counter[int] = Counter()
        for cursor in cursors:
            lags[cursor.partition] = max(0, ends[TopicPartition(topic, cursor.partition)] - cursor.next)
            metrics.ingest.lag(cursor.partition, lags[cursor.partition])
        self.ingest._change(lag=lags.total())

    def _tend_store(self, cursors: list[Cursor]) -> None:
        fragments = self.store.fragments()
        splits = ("train", "fresh_eval")
        # The owner of the first partition compacts, so that several processes do not do it at once.
        if fragments >= COMPACT_FRAGMENTS and self.assignment.cursor(0) is not None:
            fragments = self.store.compact()
        metrics.ingest.store({split: self.store.count(split=split) for split in splits}, fragments)

    def _salvage(self) -> None:
        """Store what was read before the connection was lost; its refusals are published by the next session."""
        if len(self.batch):
            outcome = self.batch.commit(self.store, self.assignment.holds)
            if outcome.cursors:
                self.ingest._stored(outcome)

    def _find_range(self) -> None:
        """An offset is not in the log: its records were deleted before they were read, or the log was cut short."""
        self._commit()
        snapshot = self.store.snapshot()
        for cursor in self.assignment.all():
            partition = TopicPartition(self.kafka.topic, cursor.partition)
            first = self.consumer.beginning_offsets([partition])[partition]
            end = self.consumer.end_offsets([partition])[partition]
            if cursor.next > end:
                fresh = next_generation(cursor, snapshot)
                say(f"ingest: [red]{cursor.key} ends at {end}, before {cursor.next}: read anew as {fresh.stream}[/red]")
                self.assignment.replace(fresh)
            elif cursor.next < first:
                say(f"ingest: [red]{cursor.key}: records {cursor.next} to {first - 1} were deleted unread[/red]")
                cursor.next = first
                self.consumer.seek(partition, first)


def run_ingest(settings: Settings) -> None:
    """Read the topic until SIGTERM or SIGINT, then store what has been read, and return."""
    ingest = Ingest(settings, on_change=_Narrator())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: ingest.stop())
    metrics.listen(settings.ingest.metrics_port)
    say(f"ingest: {settings.kafka.topic} at {settings.kafka.bootstrap} -> {ingest.store.url}")
    ingest.run()


class _Narrator:
    """Says what ingest does, at most every five seconds."""

    EVERY_SECONDS = 5.0

    def __init__(self) -> None:
        self._said = IngestStatus()
        self._at = 0.0

    def __call__(self, status: IngestStatus) -> None:
        now = time.monotonic()
        if status.state == self._said.state and now - self._at < self.EVERY_SECONDS:
            return
        self._said, self._at = status, now
        say(
            f"ingest: {status.state}; {status.samples} samples, {status.duplicates} duplicates,"
            f" {status.quarantined} quarantined, lag {'unknown' if status.lag is None else status.lag}"
        )
