"""One membership in the consumer group: what ingest does between joining and leaving."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import IllegalStateError, KafkaError, OffsetOutOfRangeError

from ops import metrics
from ops.errors import BrokerError
from ops.progress import say
from ops.settings import Settings
from streams.assignment import Assignment, Cursor, next_generation
from streams.batch import Batch, Outcome
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
#: A process that was killed is noticed after this long, and its partitions go to another.
SESSION_SECONDS = 6.0
#: The embedded broker needs 3 s for a member to join, and so does Apache Kafka for the first of a group.
JOIN_SECONDS = 6.0
#: A group that lets nobody in for so long is a problem that somebody has to look at.
GROUP_PATIENCE_SECONDS = 30.0
COMPACT_FRAGMENTS = 64


class LogLost(BrokerError):
    """The topic is not the one that this session has been reading."""


@dataclass(frozen=True, slots=True)
class IngestStatus:
    """Where ingest stands."""

    state: str = "starting"
    """``starting``, ``joining`` (the group), ``reading``, ``waiting`` (for the broker) or ``stopped``."""
    samples: int = 0
    duplicates: int = 0
    quarantined: int = 0
    commits: int = 0
    version: int = 0
    lag: int | None = None
    """Records between the store and the end of the log; None until it is known."""
    offsets: dict[str, int] = field(default_factory=dict)
    problem: str = ""


class Host(Protocol):
    """What a session needs of the ingest that it belongs to."""

    settings: Settings
    store: SampleStore
    looks: StoredLooks
    quarantine: Quarantine
    stopping: threading.Event
    status: IngestStatus

    def change(self, **changes: Any) -> None:
        """Change fields of the status."""

    def stored(self, outcome: Outcome) -> None:
        """Count a commit."""

    def wait_for_broker(self, error: BrokerError, failures: int) -> None:
        """Say that the broker is away, and wait: longer after more failures."""


class Session:
    """One membership in the consumer group."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.kafka = host.settings.kafka
        self.store = host.store
        self.batch = Batch(self.kafka, host.looks)
        self.admin = Admin(self.kafka, CONNECT_SECONDS)
        self.consumer: Any = None
        self.assignment: Assignment
        self.topic_id = ""
        self._looked_at = 0.0
        self._outside_since = 0.0

    def run(self) -> None:
        """Read until asked to stop.

        Raises:
            LogLost, Superseded: a new session is to start at once, from what the store says.
            BrokerError: no connection could be made, or it broke in a way that only a new one mends.
            StoreError: the store cannot be written.
        """
        try:
            self._connect()
            while not self.host.stopping.is_set():
                self._turn()
            self._commit()
        except (BrokerError, KafkaError, OSError) as error:
            self._salvage()
            if isinstance(error, BrokerError):
                raise
            raise explain(error, self.kafka, "reading") from error
        finally:
            if self.consumer is not None:
                self._leave()
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
        self._looked_at = self._outside_since = time.monotonic()

    def _leave(self) -> None:
        """Leave the group, not while joining it: for a member that does, the embedded broker's group waits for ever."""
        deadline = time.monotonic() + JOIN_SECONDS
        try:
            while not self.assignment.joined and self.host.status.state != "waiting" and time.monotonic() < deadline:
                self.consumer.poll(timeout_ms=int(POLL_SECONDS * 1000))  # not taken in: the next member reads it
        except KafkaError as error:
            log.info("the group was left before it was joined: %s", error)
        self.consumer.close(autocommit=False, timeout_ms=2000)

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
        while not self.host.stopping.is_set():
            try:
                act()
                return True
            except LogLost:
                raise
            except BrokerError as error:
                self._salvage()
                self.host.wait_for_broker(error, failures)
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
        metrics.ingest.broker(True)
        self._tell_state()
        if found != self.topic_id:
            raise LogLost(
                f"topic {self.kafka.topic} has lost its log (its id was {self.topic_id}, is {found or 'gone'}).",
                "The new one is read from its beginning.",
            )
        self._measure_lag()

    def _tell_state(self) -> None:
        """The broker answers: so this session reads, or the group has not let it in, which is said after a while."""
        state = "reading" if self.assignment.joined else "joining"
        if self.host.status.state != state:
            self._outside_since = time.monotonic()
            self.host.change(state=state, problem="")
        outside = time.monotonic() - self._outside_since
        if state == "joining" and not self.host.status.problem and outside > GROUP_PATIENCE_SECONDS:
            problem = (
                f"group {self.kafka.group} has not let this process in for {outside:.0f} s. Look at its members"
                " (Apache Kafka: kafka-consumer-groups.sh --describe --members); restart an embedded broker."
            )
            self.host.change(problem=problem)
            say(f"ingest: [red]{problem}[/red]")

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
            self.host.quarantine.recover(rows)
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
        self.batch.add(cursor, judge(received, self.host.settings.ingest), received.size)
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
            if self.host.status.state == "waiting" and outcome.refused:
                raise BrokerError(self.host.status.problem)
            self.host.quarantine.publish(outcome.refused)
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
        if lag != self.host.status.lag:
            self.host.change(lag=lag)

    def _tend_store(self) -> None:
        fragments = self.store.fragments()
        splits = ("train", "fresh_eval")
        # The owner of the first partition compacts, so that several processes do not do it at once.
        if fragments >= COMPACT_FRAGMENTS and self.assignment.cursor(0) is not None:
            fragments = self.store.compact()
        rows = {split: self.store.count(split=split) for split in splits}
        metrics.ingest.store(rows, self.store.size(), fragments)

    def _store(self) -> Outcome:
        started = time.monotonic()
        outcome = self.batch.commit(self.store, self.assignment.holds)
        if outcome.cursors:
            metrics.ingest.committed(time.monotonic() - started)
            self.host.stored(outcome)
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
