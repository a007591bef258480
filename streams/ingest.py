"""From the topic into the sample store.

One batch after another: read, judge, store samples and offsets in one commit, publish the refusals, and only then tell
Kafka. What Kafka remembers is for others to look at (lag); where to go on is read from the store. Killed at any
instant, every record is in the store or in the quarantine topic exactly once.

A *session* is one membership in the consumer group. A broker that goes away is waited for. When its log is lost, or
another process has taken over, the session ends, what it had read is stored if it still may be, and the next one starts
from what the store says.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import IllegalStateError, KafkaError, OffsetOutOfRangeError

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
SESSION_SECONDS = 6.0
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
                failures = 0 if self.status.commits > before else failures
                self._wait_for_broker(error, failures)
                failures += 1
        self._quarantine.close()
        self._change(state="stopped")

    def _wait_for_broker(self, error: BrokerError, failures: int) -> None:
        metrics.ingest.broker(False)
        self._change(state="waiting", problem=str(error))
        wait = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
        say(f"ingest: [yellow]{error}[/yellow] Trying again in {wait:g} s.")
        self._stop.wait(wait)

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
            samples=now.samples + outcome.samples.total(),
            duplicates=now.duplicates + outcome.duplicates.total(),
            quarantined=now.quarantined + len(outcome.refused),
            commits=now.commits + 1,
            version=outcome.version,
            offsets={**now.offsets, **{cursor.key: cursor.next for cursor in outcome.cursors}},
        )


class _Session:
    """One membership in the consumer group."""

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
            "heartbeat_interval_ms": int(SESSION_SECONDS * 1000 / 3),
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
        cursors = {each.partition: each for each in self.assignment.all()}
        try:
            polled = self.consumer.poll(timeout_ms=int(wait * 1000))
        except OffsetOutOfRangeError:
            self._find_range()
            return
        watch = polled or time.monotonic() - self._looked_at > WATCH_SECONDS
        if (watch and not self._patiently(self._look)) or not self._patiently(self._recover):
            return  # asked to stop while the broker was away: what was polled stays in the log
        for partition, records in polled.items():
            cursor = cursors.get(partition.partition)
            if cursor is not None and self.assignment.holds(cursor):
                for record in records:
                    self._take(cursor, record)
            else:  # assigned while polling: whose records these are is not certain, so they are read again
                self.assignment.rewind(partition.partition)
        if self.batch.due:
            self._commit()

    def _patiently(self, act: Callable[[], None]) -> bool:
        """Do what needs the broker, when it is there; False when asked to stop before that. Raises LogLost."""
        failures = 0
        while not self.ingest._stop.is_set():
            try:
                act()
                return True
            except LogLost:
                raise
            except BrokerError as error:
                self._salvage()
                self.ingest._wait_for_broker(error, failures)
                failures += 1
        return False

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

    def _take(self, cursor: Cursor, record: Any) -> None:
        if record.offset < cursor.next:
            return  # taken in before
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
        outcome = self._store()
        if not outcome.cursors:
            return
        self._publish(outcome)
        self._tell_kafka(outcome.cursors)
        self._measure_lag()
        self._tend_store()

    def _publish(self, outcome: Outcome) -> None:
        try:
            if self.ingest.status.state == "waiting" and outcome.refused:
                raise BrokerError(self.ingest.status.problem)
            self.ingest._quarantine.publish(outcome.refused)
        except BrokerError as error:
            log.warning("%d refusals are stored, and are published later: %s", len(outcome.refused), error)
            for cursor in outcome.cursors:
                cursor.recovered = False
        for cursor in outcome.cursors:
            if cursor.recovered:  # else there are older ones to publish first
                cursor.published = max(cursor.published, cursor.stored or 0)

    def _tell_kafka(self, cursors: list[Cursor]) -> None:
        topic = self.kafka.topic
        offsets = {TopicPartition(topic, each.partition): OffsetAndMetadata(each.next, "", -1) for each in cursors}
        try:
            self.consumer.commit(offsets, timeout_ms=5000)
        except KafkaError as error:  # a rebalance, or a broker that is away: the store is what counts
            log.info("offsets were stored, and could not be told to Kafka: %s", error)

    def _measure_lag(self) -> None:
        """How far the store is behind, by what the broker said with the last fetch of each partition."""
        lag = 0
        for cursor in self.assignment.all():
            try:
                end = self.consumer.highwater(TopicPartition(self.kafka.topic, cursor.partition))
            except IllegalStateError:  # just revoked
                continue
            if end is not None:
                behind = max(0, end - (cursor.stored or 0))
                metrics.ingest.lag(cursor.partition, behind)
                lag += behind
        self.ingest._change(lag=lag)

    def _tend_store(self) -> None:
        fragments = self.store.fragments()
        splits = ("train", "fresh_eval")
        # The owner of the first partition compacts, so that several processes do not do it at once.
        if fragments >= COMPACT_FRAGMENTS and self.assignment.cursor(0) is not None:
            fragments = self.store.compact()
        metrics.ingest.store({split: self.store.count(split=split) for split in splits}, fragments)

    def _store(self) -> Outcome:
        started = time.monotonic()
        outcome = self.batch.commit(self.store, self.assignment.holds)
        if outcome.cursors:
            metrics.ingest.committed(time.monotonic() - started)
            self.ingest._stored(outcome)
        return outcome

    def _salvage(self) -> None:
        """Store what has been read though the broker is away; its refusals are published when it is back."""
        if len(self.batch):
            for cursor in self._store().cursors:
                cursor.recovered = False

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
