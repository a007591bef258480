"""Kafka clients of ingest: for topics, for reading, and for the quarantine topic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from kafka import KafkaConsumer

from core.settings.streams import Kafka
from ratchet_client.broker import MAX_RECORD_BYTES, client_options
from streams.kafka import tolerant_fetch
from streams.kafka.clients import Admin, connection
from streams.kafka.outbox import FencedSender

BATCH_BYTES: Final = 16 << 20
"""Bytes of records per commit: large enough for efficient writes, small enough to be in memory three times."""
POLL_RECORDS: Final = 256
"""Records per poll: they wait in memory while earlier ones are validated and committed."""
CONNECT_SECONDS: Final = 3.0
SESSION_SECONDS: Final = 6.0
"""Time until a killed process is noticed, and its partitions go to another."""


class IngestClients:
    def __init__(self, kafka: Kafka) -> None:
        self.kafka = kafka

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
