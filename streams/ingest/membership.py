"""A consumer's Kafka clients and group membership: its partitions, their start positions, and checks of their log. The
store, not Kafka, decides where to continue in a partition. A log can be lost, truncated, or deleted before it was
read."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from kafka import ConsumerRebalanceListener, KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import IllegalStateError, KafkaError

from core import metrics
from core.errors import BrokerError
from core.settings.streams import Kafka
from ratchet_client.broker import MAX_RECORD_BYTES, client_options
from streams.kafka import tolerant_fetch
from streams.kafka.clients import Admin, connection
from streams.kafka.outbox import FencedSender
from streams.kafka.tolerant_fetch import seek
from streams.store.rows import Position, newest_of_topic, parse_stream, stream_name
from streams.store.sample_store import SampleStore
from streams.store.writer import Claim

log = logging.getLogger(__name__)
BATCH_BYTES: Final = 16 << 20
"""Bytes of records per commit: large enough for efficient writes, small enough to be in memory three times."""
POLL_RECORDS: Final = 256
"""Records per poll: they wait in memory while earlier ones are validated and committed."""
CONNECT_SECONDS: Final = 3.0
SESSION_SECONDS: Final = 6.0
"""Time until a killed process is noticed, and its partitions go to another."""
POLL_SECONDS: Final = 0.25
#: A member needs 3 s to join on the embedded broker, as does the first of a group on Apache Kafka.
JOIN_SECONDS: Final = 6.0
LOOK_SECONDS: Final = 2.0
"""Interval of log checks while no records arrive, which also detect a lost broker."""


@dataclass(eq=False, slots=True)
class PartitionReader:
    claim: Claim
    next: int
    """Next offset to take in; ahead of the claim's position by what is not stored yet."""
    leader_epoch: int = -1
    """Epoch of the last validated record; stored in the position."""
    next_epoch: int = -1
    """Epoch of the record before ``next``. An older one would make a newer leader's records look like a truncated
    log."""
    taken: int = -1
    """The offset after the last record taken. Offsets from here to ``next`` yield no record: transaction markers,
    aborted records, compacted ones."""

    @classmethod
    def of(cls, claim: Claim) -> PartitionReader:
        return cls(claim, claim.position.next, claim.position.leader_epoch, claim.position.leader_epoch)

    @property
    def stream(self) -> str:
        return self.claim.position.stream

    @property
    def partition(self) -> int:
        return self.claim.position.partition

    def behind(self, end: int) -> tuple[int, int]:
        """The next offset, and the leader epoch before it, once everything before ``end`` is stored."""
        return (self.next, self.next_epoch) if self.taken <= end < self.next else (end, self.leader_epoch)

    @property
    def stored(self) -> int:
        return self.claim.position.next


def start_position(known: Iterable[Position], topic: str, topic_id: str, partition: int, first: int) -> Position:
    """The position from which to read a partition whose log begins at offset ``first``. A topic whose ID differs from
    the store's has lost its log (a restarted embedded broker, a recreated topic): its offsets mean other records now,
    so it is read from the beginning, as a new generation. A missing ID on either side proves nothing: some brokers have
    none."""
    newest = newest_of_topic(known, topic)
    mine = newest.get(partition)
    if mine is not None and mine.topic_id == topic_id:
        return mine
    if mine is not None and not (mine.topic_id and topic_id):
        return replace(mine, topic_id=mine.topic_id or topic_id)
    generations = {parse_stream(each.stream)[1]: each.topic_id for each in newest.values()}
    same = [number for number, id_ in generations.items() if id_ == topic_id]
    generation = max(same) if same else max(generations, default=-1) + 1
    if mine is not None:
        log.warning(
            "topic %s is a new log (id %s, was %s): partition %d had been read up to %d of the old one, and is now read"
            " from its beginning as %s",
            topic, topic_id, mine.topic_id, partition, mine.next, stream_name(topic, generation),
        )  # fmt: skip
    return Position(stream_name(topic, generation), partition, first, topic_id, published=first)


def new_generation(known: Iterable[Position], position: Position, start: int) -> Position:
    """The position to continue from in a log that was truncated at ``start`` and then rewritten."""
    topic, _ = parse_stream(position.stream)
    highest = max(parse_stream(each.stream)[1] for each in (*known, position))
    stream = stream_name(topic, highest + 1)
    return Position(stream, position.partition, start, position.topic_id, published=start)


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """The partitions that the group assigned to this process. Kafka's thread calls the two listener methods, which only
    record changes: it must not wait for the store. The consumer's loop claims new ones. A partition that is lost and
    comes back gets a new reader, so what was read under the old one is recognized and dropped."""

    def __init__(self, consumer: Any, topic: str) -> None:
        self.consumer = consumer
        self.topic = topic
        self.joined = False
        """True once the group has assigned partitions (or none); False while joining or rejoining."""
        self._lock = threading.Lock()
        self._assigned: set[int] = set()
        self._readings: dict[int, PartitionReader] = {}

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Pause new partitions: nothing is fetched before they are claimed."""
        for partition in assigned:
            self.consumer.seek(partition, 0)
            self.consumer.pause(partition)
            with self._lock:
                self._assigned.add(partition.partition)
                self._readings.pop(partition.partition, None)
        self.joined = True

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Drop partitions; the next owner reads again what was not stored. Also called for partitions lost because the
        group continued without this process."""
        self.joined = False
        with self._lock:
            for each in revoked:
                self._assigned.discard(each.partition)
                self._readings.pop(each.partition, None)

    def unclaimed(self) -> list[int]:
        with self._lock:
            return sorted(self._assigned - self._readings.keys())

    def begin(self, reading: PartitionReader) -> bool:
        """Start reading a partition at its reader's offset. False if it is no longer assigned."""
        partition = TopicPartition(self.topic, reading.partition)
        with self._lock:
            if reading.partition not in self._assigned:
                return False
            self._readings[reading.partition] = reading
        seek(self.consumer, partition, reading.next, reading.next_epoch)
        self.consumer.resume(partition)
        return True

    def give_up(self, reading: PartitionReader) -> None:
        """Drop a reader: another process claimed the partition, or its log changed. It must be claimed again."""
        with self._lock:
            if self._readings.get(reading.partition) is reading:
                del self._readings[reading.partition]
                if reading.partition in self._assigned:
                    self.consumer.pause(TopicPartition(self.topic, reading.partition))

    def reading(self, partition: int) -> PartitionReader | None:
        with self._lock:
            return self._readings.get(partition)

    def holds(self, reading: PartitionReader) -> bool:
        """True if records read by ``reading`` may still be stored."""
        return self.reading(reading.partition) is reading

    def all(self) -> list[PartitionReader]:
        with self._lock:
            return [self._readings[number] for number in sorted(self._readings)]


@dataclass
class IngestClients:
    kafka: Kafka

    def admin(self) -> Admin:
        return Admin(self.kafka, CONNECT_SECONDS)

    def consumer(self) -> KafkaConsumer:
        """A group member that skips unreadable records. Raises KafkaError, ConfigError."""
        consumer = KafkaConsumer(**consumer_options(self.kafka))
        tolerant_fetch.install(consumer, MAX_RECORD_BYTES)  # also checks the version of kafka-python
        tolerant_fetch.complete_joins(consumer)
        tolerant_fetch.make_no_topics(consumer)
        return consumer

    def sender(self, name: str, still_owner: Callable[[], bool]) -> FencedSender:
        return FencedSender(self.kafka, name, still_owner)


def consumer_options(kafka: Kafka) -> dict[str, Any]:
    """Options of the consumer. ``kafka.client`` overrides all except the first four."""
    bounds = {
        "group_id": kafka.group,
        "enable_auto_commit": False,
        "auto_offset_reset": "none",  # the store has the position; Kafka must not guess
        "isolation_level": "read_committed",
        "bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000),
        "session_timeout_ms": int(SESSION_SECONDS * 1000),
        "heartbeat_interval_ms": int(SESSION_SECONDS * 1000 / 3),
        "reconnect_backoff_max_ms": 1000,
        "max_poll_records": POLL_RECORDS,
        "fetch_max_bytes": BATCH_BYTES,
        "max_partition_fetch_bytes": BATCH_BYTES // 2,
        "receive_message_max_bytes": MAX_RECORD_BYTES + BATCH_BYTES,
    }
    return {**bounds, **client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG)}


class LogLost(BrokerError):
    """The topic's log is not the one read so far."""


class Membership:
    """A membership in the consumer group, and checks of the topic's log. Use from the consumer's thread."""

    def __init__(self, consumer: Any, assignment: Assignment, admin: Admin, topic_id: str) -> None:
        self.consumer = consumer
        self.assignment = assignment
        self.topic_id = topic_id
        self._admin = admin
        self._topic = assignment.topic
        self._looked_at = time.monotonic()
        self._measured: set[int] = set()

    @classmethod
    def join(cls, clients: IngestClients, admin: Admin, store: SampleStore) -> Membership:
        topic = clients.kafka.topic
        topic_id = _ensure_topics(clients.kafka, admin, store)
        consumer = clients.consumer()
        assignment = Assignment(consumer, topic)
        consumer.subscribe([topic], listener=assignment)
        # A member that joins before it knows the topic is assigned nothing, and joins a second time.
        consumer.partitions_for_topic(topic)
        return cls(consumer, assignment, admin, topic_id)

    def leave(self, wait_while: Callable[[], bool]) -> None:
        """Leave the group, but not while joining it, for which the embedded broker's group would wait for ever. Waits
        to be admitted first while ``wait_while()``, for at most :data:`JOIN_SECONDS`."""
        deadline = time.monotonic() + JOIN_SECONDS
        try:
            while not self.assignment.joined and wait_while() and time.monotonic() < deadline:
                self.consumer.poll(timeout_ms=int(POLL_SECONDS * 1000))  # nothing unclaimed is fetched
        except KafkaError as error:
            log.info("the group was left before it was joined: %s", error)
        try:
            self.consumer.close(autocommit=False, timeout_ms=2000)
        except (KafkaError, OSError) as error:
            log.info("the group was not left in order: %s", error)

    def stay(self) -> None:
        """Poll without taking records: the group removes a member that does not poll for minutes."""
        readings = self.assignment.all()
        try:
            self.consumer.pause(*(TopicPartition(self._topic, each.partition) for each in readings))
            self.consumer.poll(timeout_ms=0)
        except KafkaError as error:
            log.info("the group could not be asked while waiting: %s", error)
        for reading in readings:
            if self.assignment.holds(reading):
                self.assignment.begin(reading)

    def follow_positions(self) -> None:
        """Skip offsets that yield no record. Call it when everything polled was taken."""
        for reading in self.assignment.all():
            partition = TopicPartition(self._topic, reading.partition)
            position = tolerant_fetch.position(self.consumer, partition)
            if position is not None and position.offset > reading.next and self.assignment.holds(reading):
                reading.next, reading.next_epoch = position.offset, max(position.leader_epoch, reading.next_epoch)

    def tell_kafka(self, readings: Sequence[PartitionReader]) -> None:
        offsets = {
            TopicPartition(self._topic, each.partition): OffsetAndMetadata(each.stored, "", -1) for each in readings
        }
        try:
            self.consumer.commit(offsets, timeout_ms=5000)
        except KafkaError as error:  # a rebalance, or an unreachable broker: the store is authoritative
            log.info("offsets were stored, and could not be told to Kafka: %s", error)

    # -- the log ----------------------------------------------------------------------------------------------------

    @property
    def look_due(self) -> bool:
        return time.monotonic() - self._looked_at > LOOK_SECONDS

    def look(self) -> None:
        """Check that what was just polled comes from the log read so far. Raises LogLost, BrokerError. Called after
        each poll (0.5 ms): logs never come back, so if the topic still has its ID now, it had it then. If the topic has
        more partitions than the consumer knows, the consumer refreshes now, so that the group assigns them; by itself
        it would take up to five minutes."""
        topic = self._admin.topic(self._topic)
        self._looked_at = time.monotonic()
        if topic is None or topic.id != self.topic_id:
            now = topic.id if topic else "gone"
            raise LogLost(
                f"topic {self._topic} has lost its log (its id was {self.topic_id}, is {now}).",
                "The new one is read from its beginning.",
            )
        tolerant_fetch.expect_partitions(self.consumer, self._topic, topic.partitions)

    def range(self, partition: int) -> tuple[int, int]:
        key = TopicPartition(self._topic, partition)
        return self.consumer.beginning_offsets([key])[key], self.consumer.end_offsets([key])[key]

    def lag(self) -> int | None:
        """Records that the store is behind, by the high watermark of each partition's last fetch. None if none is
        known. Also removes the metric of partitions that are no longer read here."""
        lags = {}
        for reading in self.assignment.all():
            try:
                end = self.consumer.highwater(TopicPartition(self._topic, reading.partition))
            except IllegalStateError:  # just revoked
                continue
            if end is not None:
                lags[reading.partition] = max(0, end - reading.stored)
        for partition, records in lags.items():
            metrics.ingest.lag(partition, records)
        self.forget_lag(self._measured - lags.keys())
        self._measured = set(lags)
        return sum(lags.values()) if lags else None

    def forget_lag(self, partitions: Iterable[int] | None = None) -> None:
        for partition in list(self._measured if partitions is None else partitions):
            metrics.ingest.no_lag(partition)
            self._measured.discard(partition)


def _ensure_topics(kafka: Kafka, admin: Admin, store: SampleStore) -> str:
    """Create the topics, but not one that was read before: its settings might differ. Returns the topic's ID."""
    topic = kafka.topic
    if not any(parse_stream(position.stream)[0] == topic for position in store.positions().values()):
        admin.ensure_topics([topic], kafka.partitions)
    admin.ensure_topics([kafka.quarantine_topic])
    topic_id = admin.topic_id(topic)
    if topic_id is None:
        raise BrokerError(
            f"topic {topic} is gone, which had been read before.",
            "Make it again, with the partitions and settings that it had; its new log is read from the beginning.",
        )
    admin.warn_of_defaults(topic, kafka.partitions)
    admin.warn_of_defaults(kafka.quarantine_topic, 1)
    return topic_id
