"""A consumer's membership in its group: the partitions that it reads, from where, and its look at their log.

Where to go on in a partition is decided by the store, not by Kafka. Next to being appended to, a log can be lost, cut
off, or deleted before it was read.
"""

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
from streams.kafka.tolerant_fetch import seek
from streams.store.rows import Position, newest_of_topic, parse_stream, stream_name
from streams.store.sample_store import SampleStore
from streams.store.writer import Claim

log = logging.getLogger(__name__)
POLL_SECONDS: Final = 0.25
BATCH_BYTES: Final = 16 << 20
"""Most bytes of records in one commit: large enough for efficient writes, small enough to be in memory three times."""
POLL_RECORDS: Final = 256
"""Records of one poll: they wait in memory while those before them are validated and committed."""
CONNECT_SECONDS: Final = 3.0
#: The embedded broker needs 3 s for a member to join, and so does Apache Kafka for the first of a group.
JOIN_SECONDS: Final = 6.0
SESSION_SECONDS: Final = 6.0
"""A process that was killed is noticed after this long, and its partitions go to another."""
LOOK_SECONDS: Final = 2.0
"""Time between two looks at the log while no records come, after which a lost broker is noticed, too."""


@dataclass(eq=False, slots=True)
class PartitionReader:
    """Reading one partition, from its claim to its loss."""

    claim: Claim
    next: int
    """Next offset to take in; ahead of the claim's position by what has not been stored yet."""
    leader_epoch: int = -1
    """Of the last record that was validated; with what is stored of it, it goes into the position."""
    next_epoch: int = -1
    """Of the record before ``next``. An older one would make a newer leader's records look like a truncated log."""
    taken: int = -1
    """The offset behind the last record that was taken in. Up to ``next`` there are others of which no reader gets a
    record: markers of transactions, aborted records, what compaction removed."""

    @classmethod
    def of(cls, claim: Claim) -> PartitionReader:
        """Read on from a claim's position."""
        return cls(claim, claim.position.next, claim.position.leader_epoch, claim.position.leader_epoch)

    @property
    def stream(self) -> str:
        """The topic with its generation."""
        return self.claim.position.stream

    @property
    def partition(self) -> int:
        """The partition's number."""
        return self.claim.position.partition

    def behind(self, end: int) -> tuple[int, int]:
        """The next offset, and the leader epoch of what lies before it, once all before ``end`` is stored."""
        return (self.next, self.next_epoch) if self.taken <= end < self.next else (end, self.leader_epoch)

    @property
    def stored(self) -> int:
        """Next offset as the store has it."""
        return self.claim.position.next


def start_position(known: Iterable[Position], topic: str, topic_id: str, partition: int, first: int) -> Position:
    """The position from which a partition is read whose log begins at offset ``first``.

    A topic whose id is not the one in the store has lost its log (an embedded broker that was restarted, a topic that
    was deleted and made again): its offsets mean other records now, so it is read from its beginning, as a new
    generation. An id that is missing, here or there, tells nothing: a broker that has none was used before, or is now.
    """
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
    """The position from which a log is read on that was cut off at ``start``, behind which other records stand now."""
    topic, _ = parse_stream(position.stream)
    highest = max(parse_stream(each.stream)[1] for each in (*known, position))
    stream = stream_name(topic, highest + 1)
    return Position(stream, position.partition, start, position.topic_id, published=start)


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """The partitions that the group gave to this process.

    Kafka's thread calls the two listener methods, which only take notes: it must not wait for the store. The consumer's
    loop claims what is new. A partition that is lost and comes back has a new reading, so what was read under the old
    one can be told apart and is dropped.
    """

    def __init__(self, consumer: Any, topic: str) -> None:
        self.consumer = consumer
        self.topic = topic
        self.joined = False
        """True if the group has said what is ours, be it nothing; not while it is being joined, again or at first."""
        self._lock = threading.Lock()
        self._assigned: set[int] = set()
        self._readings: dict[int, PartitionReader] = {}

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Nothing is fetched of them before they are claimed."""
        for partition in assigned:
            self.consumer.seek(partition, 0)
            self.consumer.pause(partition)
            with self._lock:
                self._assigned.add(partition.partition)
                self._readings.pop(partition.partition, None)
        self.joined = True

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Forget them; what was read and not stored is read again by the next owner."""
        self.joined = False
        with self._lock:
            for each in revoked:
                self._assigned.discard(each.partition)
                self._readings.pop(each.partition, None)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """The group went on without this process."""
        self.on_partitions_revoked(lost)

    def unclaimed(self) -> list[int]:
        """Partitions that are ours and not read yet."""
        with self._lock:
            return sorted(self._assigned - self._readings.keys())

    def begin(self, reading: PartitionReader) -> bool:
        """Read a partition on from where ``reading`` stands. False when it is not ours any more."""
        partition = TopicPartition(self.topic, reading.partition)
        with self._lock:
            if reading.partition not in self._assigned:
                return False
            self._readings[reading.partition] = reading
        seek(self.consumer, partition, reading.next, reading.next_epoch)
        self.consumer.resume(partition)
        return True

    def give_up(self, reading: PartitionReader) -> None:
        """Another process has claimed it, or its log is another: it has to be claimed again."""
        with self._lock:
            if self._readings.get(reading.partition) is reading:
                del self._readings[reading.partition]
                if reading.partition in self._assigned:
                    self.consumer.pause(TopicPartition(self.topic, reading.partition))

    def reading(self, partition: int) -> PartitionReader | None:
        """The reading of a partition, or None when it is not ours (any more)."""
        with self._lock:
            return self._readings.get(partition)

    def holds(self, reading: PartitionReader) -> bool:
        """True if what was read under ``reading`` is still ours to store."""
        return self.reading(reading.partition) is reading

    def all(self) -> list[PartitionReader]:
        """All readings."""
        with self._lock:
            return [self._readings[number] for number in sorted(self._readings)]


class LogLost(BrokerError):
    """The topic is not the one that has been read so far."""


class Membership:
    """A membership in the consumer group, and a look at the topic's log. Use from the consumer's thread."""

    def __init__(self, consumer: Any, assignment: Assignment, admin: Admin, topic_id: str) -> None:
        """``consumer``: the :class:`kafka.KafkaConsumer`. ``topic_id``: of the log that is read."""
        self.consumer = consumer
        self.assignment = assignment
        self.topic_id = topic_id
        self._admin = admin
        self._topic = assignment.topic
        self._looked_at = time.monotonic()
        self._measured: set[int] = set()

    @classmethod
    def join(cls, kafka: Kafka, admin: Admin, store: SampleStore) -> Membership:
        """Connect, and begin to join the group. Raises BrokerError, StoreUnavailable."""
        topic_id = _ensure_topics(kafka, admin, store)
        bounds = {
            "group_id": kafka.group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",  # the store knows where to go on; Kafka must not guess
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
        consumer = KafkaConsumer(**{**bounds, **client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG)})
        tolerant_fetch.install(consumer, MAX_RECORD_BYTES)  # which checks that it is the kafka-python that we know
        tolerant_fetch.complete_joins(consumer)
        tolerant_fetch.make_no_topics(consumer)
        assignment = Assignment(consumer, kafka.topic)
        consumer.subscribe([kafka.topic], listener=assignment)
        # A member that joins before it knows the topic is assigned nothing, and joins a second time.
        consumer.partitions_for_topic(kafka.topic)
        return cls(consumer, assignment, admin, topic_id)

    def leave(self, wait_while: Callable[[], bool]) -> None:
        """Leave the group, not while joining it: for a member that does, the embedded broker's group waits for ever.

        Args:
            wait_while: holds, it waits to be let in first, for :data:`JOIN_SECONDS` at most.
        """
        deadline = time.monotonic() + JOIN_SECONDS
        try:
            while not self.assignment.joined and wait_while() and time.monotonic() < deadline:
                self.consumer.poll(timeout_ms=int(POLL_SECONDS * 1000))  # nothing is fetched of what is not claimed
        except KafkaError as error:
            log.info("the group was left before it was joined: %s", error)
        try:
            self.consumer.close(autocommit=False, timeout_ms=2000)
        except (KafkaError, OSError) as error:
            log.info("the group was not left in order: %s", error)

    def stay(self) -> None:
        """Poll without taking anything: a member that does not poll for minutes is put out of the group."""
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
        """Step over offsets of which no reader gets a record. All that was polled is taken."""
        for reading in self.assignment.all():
            partition = TopicPartition(self._topic, reading.partition)
            position = tolerant_fetch.position(self.consumer, partition)
            if position is not None and position.offset > reading.next and self.assignment.holds(reading):
                reading.next, reading.next_epoch = position.offset, max(position.leader_epoch, reading.next_epoch)

    def tell_kafka(self, readings: Sequence[PartitionReader]) -> None:
        """Commit what is stored of them as the group's offsets."""
        offsets = {
            TopicPartition(self._topic, each.partition): OffsetAndMetadata(each.stored, "", -1) for each in readings
        }
        try:
            self.consumer.commit(offsets, timeout_ms=5000)
        except KafkaError as error:  # a rebalance, or a broker that is away: the store is what counts
            log.info("offsets were stored, and could not be told to Kafka: %s", error)

    # -- the log ----------------------------------------------------------------------------------------------------

    @property
    def look_due(self) -> bool:
        """True if it is time to :meth:`look`."""
        return time.monotonic() - self._looked_at > LOOK_SECONDS

    def look(self) -> None:
        """Make sure that what was just polled is from the log that has been read so far.

        Asked after each poll (0.5 ms): a log cannot come back, so if the topic still has its id now, it had it then.
        If the topic has more partitions than the consumer knows, the consumer asks for them now, so that the group
        shares them out; by itself it would after up to five minutes.

        Raises:
            LogLost, BrokerError
        """
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
        """First and end offset of a partition's log."""
        key = TopicPartition(self._topic, partition)
        return self.consumer.beginning_offsets([key])[key], self.consumer.end_offsets([key])[key]

    def lag(self) -> int | None:
        """Records that the store is behind, by what the broker said with the last fetch of each partition.

        None while that is not known of any. The metric of a partition that is not read here any more goes.
        """
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
        """Take partitions (all by default) out of the metrics."""
        for partition in list(self._measured if partitions is None else partitions):
            metrics.ingest.no_lag(partition)
            self._measured.discard(partition)


def _ensure_topics(kafka: Kafka, admin: Admin, store: SampleStore) -> str:
    """Make the topics, but not one again that was read before: with other settings, perhaps. Returns its id."""
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
