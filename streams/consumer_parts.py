"""What a consumer is made of: the parts that outlive a connection to the broker, and the connection itself."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kafka import KafkaConsumer

from core.errors import BrokerError
from core.settings import Settings
from core.settings.streams import Kafka
from ratchet_client.broker import MAX_RECORD_BYTES, client_options
from streams import tolerant_fetch
from streams.assignment import Assignment
from streams.batch import Batch
from streams.clients import Admin, connection
from streams.crash_guard import CrashGuard
from streams.indexing import Indexing
from streams.log_watch import LogWatch
from streams.quality.duplicates import DuplicateIndex
from streams.quality.sides import SplitRule
from streams.quarantine import RefusalPublisher
from streams.rows import parse_stream
from streams.store import SampleStore
from streams.validation_pool import ValidationPool, Validators
from streams.validators import ProcessValidators, ThreadValidators, Work
from streams.writer import StoreWriter

POLL_RECORDS: Final = 256
"""Records of one poll: they wait in memory while those before them are validated and committed."""
CONNECT_SECONDS: Final = 3.0
SESSION_SECONDS: Final = 6.0
"""A process that was killed is noticed after this long, and its partitions go to another."""


@dataclass(frozen=True, slots=True)
class ConsumerParts:
    """What outlives a connection to the broker."""

    guard: CrashGuard
    writer: StoreWriter
    batch: Batch
    pool: ValidationPool
    publisher: RefusalPublisher
    indexing: Indexing

    @classmethod
    def open(cls, settings: Settings, store: SampleStore, processes: int) -> ConsumerParts:
        """``processes``: that validate; with 0, threads do. Raises StoreUnavailable."""
        limits, kafka, folder = settings.ingest, settings.kafka, settings.home / "ingest"
        name, split_key = store.table.identity()
        if limits.split_key is not None:
            split_key = hashlib.sha256(limits.split_key.get_secret_value().encode()).digest()
        split = SplitRule(split_key, limits.fresh_eval_share)
        index = DuplicateIndex(folder / "duplicates.db", name, limits.near_duplicate_distance, split)
        writer = StoreWriter(store.table)
        guard, validators = _validators(Work(limits, kafka), processes, folder)
        records = 2 * kafka.batch_records + POLL_RECORDS
        return cls(
            guard,
            writer,
            Batch(kafka, writer, index),
            ValidationPool(validators, 2 * kafka.batch_bytes, records),
            RefusalPublisher(kafka, store),
            Indexing(index, store.table),
        )

    def close(self) -> None:
        """End; what is inside is given up."""
        self.pool.close()
        self.publisher.close()
        self.indexing.stop()
        self.batch.index.close()
        self.guard.close()


@dataclass(frozen=True, slots=True)
class Connection:
    """A membership in the consumer group."""

    consumer: Any
    """The :class:`kafka.KafkaConsumer`."""
    assignment: Assignment
    log: LogWatch

    @classmethod
    def join(cls, kafka: Kafka, admin: Admin, store: SampleStore) -> Connection:
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
        # Asking for a topic that is lost would make it again, with the broker's number of partitions. kafka-python 3.0
        # takes this option of a consumer and does not hand it on.
        consumer._client.cluster.config["allow_auto_create_topics"] = False
        assignment = Assignment(consumer, kafka.topic)
        log = LogWatch(admin, consumer, kafka.topic, topic_id)
        consumer.subscribe([kafka.topic], listener=assignment)
        # A member that joins before it knows the topic is assigned nothing, and joins a second time.
        consumer.partitions_for_topic(kafka.topic)
        return cls(consumer, assignment, log)


def _validators(work: Work, processes: int, folder: Path) -> tuple[CrashGuard, Validators]:
    if processes:
        guard = CrashGuard(folder, processes * work.threads)
        return guard, ProcessValidators(work, processes, guard)
    threads = (os.cpu_count() or 1) + work.threads - 1
    guard = CrashGuard(folder, threads)
    return guard, ThreadValidators(work, threads, guard)


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
