"""The Kafka clients of an ingest, made in one place: for topics, for reading, and for the quarantine topic."""

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
"""Most bytes of records in one commit: large enough for efficient writes, small enough to be in memory three times."""
POLL_RECORDS: Final = 256
"""Records of one poll: they wait in memory while those before them are validated and committed."""
CONNECT_SECONDS: Final = 3.0
SESSION_SECONDS: Final = 6.0
"""A process that was killed is noticed after this long, and its partitions go to another."""


class IngestClients:
    """Makes the clients of one broker."""

    def __init__(self, kafka: Kafka) -> None:
        self.kafka = kafka

    def admin(self) -> Admin:
        """For questions about topics."""
        return Admin(self.kafka, CONNECT_SECONDS)

    def consumer(self) -> KafkaConsumer:
        """A member of the group that steps over what cannot be read. Raises KafkaError, ConfigError."""
        consumer = KafkaConsumer(**consumer_options(self.kafka))
        tolerant_fetch.install(consumer, MAX_RECORD_BYTES)  # which checks that it is the kafka-python that we know
        tolerant_fetch.complete_joins(consumer)
        tolerant_fetch.make_no_topics(consumer)
        return consumer

    def sender(self, name: str, still_owner: Callable[[], bool]) -> FencedSender:
        """Writes the quarantined records of one partition; ``name`` is its transactional id."""
        return FencedSender(self.kafka, name, still_owner)


def consumer_options(kafka: Kafka) -> dict[str, Any]:
    """Options of the consumer. Those in ``kafka.client`` count more; it cannot have the first four."""
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
    return {**bounds, **client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG)}
