"""A consumer's membership in its group, and its look at the log that it reads.

Next to being appended to, a log can be lost, cut off, or deleted before it was read.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.errors import IllegalStateError, KafkaError

from core import metrics
from core.errors import BrokerError
from core.settings.streams import Kafka
from ratchet_client.broker import MAX_RECORD_BYTES, client_options
from streams.ingest.assignment import Assignment, Reading
from streams.ingest.quality.validate import StoreRow
from streams.kafka import tolerant_fetch
from streams.kafka.clients import Admin, connection
from streams.store.rows import parse_stream
from streams.store.sample_store import SampleStore

POLL_SECONDS: Final = 0.25
POLL_RECORDS: Final = 256
"""Records of one poll: they wait in memory while those before them are validated and committed."""
CONNECT_SECONDS: Final = 3.0
#: The embedded broker needs 3 s for a member to join, and so does Apache Kafka for the first of a group.
JOIN_SECONDS: Final = 6.0
SESSION_SECONDS: Final = 6.0
"""A process that was killed is noticed after this long, and its partitions go to another."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Membership:
    """A membership in the consumer group."""

    consumer: Any
    """The :class:`kafka.KafkaConsumer`."""
    assignment: Assignment
    log: LogWatch

    @classmethod
    def join(cls, kafka: Kafka, admin: Admin, store: SampleStore) -> Membership:
        """Connect, and begin to join the group. Raises BrokerError, StoreUnavailable."""
        topic_id = _ensure_topics(kafka, admin, store)
        bounds = {
            "group_id": kafka.group,
            "enable_auto_commit": False,
            "auto_offset_reset": "none",  # the store knows where to go on; Kafka must not guess
            "isolation_level": kafka.isolation_level,
            "bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000),
            "session_timeout_ms": int(SESSION_SECONDS * 1000),
            "heartbeat_interval_ms": int(SESSION_SECONDS * 1000 / 3),
            "reconnect_backoff_max_ms": 1000,
            "max_poll_records": POLL_RECORDS,
            "fetch_max_bytes": kafka.batch_bytes,
            "max_partition_fetch_bytes": max(1, kafka.batch_bytes // 2),
            "receive_message_max_bytes": MAX_RECORD_BYTES + kafka.batch_bytes,
        }
        consumer = KafkaConsumer(**{**bounds, **client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG)})
        tolerant_fetch.install(consumer, MAX_RECORD_BYTES)  # which checks that it is the kafka-python that we know
        tolerant_fetch.complete_joins(consumer)
        # Asking for a topic that is lost would make it again, with the broker's number of partitions. kafka-python 3.0
        # takes this option of a consumer and does not hand it on.
        consumer._client.cluster.config["allow_auto_create_topics"] = False
        assignment = Assignment(consumer, kafka.topic)
        log = LogWatch(admin, consumer, kafka.topic, topic_id)
        consumer.subscribe([kafka.topic], listener=assignment)
        # A member that joins before it knows the topic is assigned nothing, and joins a second time.
        consumer.partitions_for_topic(kafka.topic)
        return cls(consumer, assignment, log)

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
            self.consumer.pause(*(TopicPartition(self.assignment.topic, each.partition) for each in readings))
            self.consumer.poll(timeout_ms=0)
        except KafkaError as error:
            log.info("the group could not be asked while waiting: %s", error)
        for reading in readings:
            if self.assignment.holds(reading):
                self.assignment.begin(reading)

    def follow_positions(self) -> None:
        """Step over offsets of which no reader gets a record. All that was polled is taken."""
        for reading in self.assignment.all():
            partition = TopicPartition(self.assignment.topic, reading.partition)
            position = tolerant_fetch.position(self.consumer, partition)
            if position is not None and position.offset > reading.next and self.assignment.holds(reading):
                reading.next, reading.next_epoch = position.offset, max(position.leader_epoch, reading.next_epoch)

    def tell_kafka(self, readings: Sequence[Reading]) -> None:
        """Commit what is stored of them as the group's offsets."""
        topic = self.assignment.topic
        offsets = {TopicPartition(topic, each.partition): OffsetAndMetadata(each.stored, "", -1) for each in readings}
        try:
            self.consumer.commit(offsets, timeout_ms=5000)
        except KafkaError as error:  # a rebalance, or a broker that is away: the store is what counts
            log.info("offsets were stored, and could not be told to Kafka: %s", error)


class LogLost(BrokerError):
    """The topic is not the one that has been read so far."""


class LogWatch:
    """Looks at the topic that a consumer reads. Use from the consumer's thread."""

    #: How often it is looked at while no records come, which is also how soon a lost broker is noticed.
    SECONDS: Final = 2.0

    def __init__(self, admin: Admin, consumer: Any, topic: str, topic_id: str) -> None:
        self._admin = admin
        self._consumer = consumer
        self._topic = topic
        self.topic_id = topic_id
        self._looked_at = time.monotonic()
        self._measured: set[int] = set()

    @property
    def due(self) -> bool:
        """Whether it is time to look."""
        return time.monotonic() - self._looked_at > self.SECONDS

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
        cluster = self._consumer._client.cluster
        if topic.partitions > len(cluster.partitions_for_topic(self._topic) or ()):
            cluster.request_update()

    def range(self, partition: int) -> tuple[int, int]:
        """First and end offset of a partition's log."""
        key = TopicPartition(self._topic, partition)
        return self._consumer.beginning_offsets([key])[key], self._consumer.end_offsets([key])[key]

    def lag(self, readings: Iterable[Reading]) -> int | None:
        """How far the store is behind, by what the broker said with the last fetch of each partition.

        None while that is not known of any. The metric of a partition that is not read here any more goes.
        """
        lags = {}
        for reading in readings:
            try:
                end = self._consumer.highwater(TopicPartition(self._topic, reading.partition))
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


def gap(reading: Reading, start: int, until: int) -> StoreRow:
    """The row that says that the broker deleted the offsets from ``start`` to before ``until`` unread."""
    return {
        "kind": "gap",
        "topic": reading.stream,
        "partition": reading.partition,
        "offset": start,
        "until": until,
        "reason": "retention",
        "detail": f"{until - start} offsets: the broker deleted them before they were read",
        "ingested_at": datetime.now(UTC),
    }


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
