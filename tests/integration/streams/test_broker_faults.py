"""Ratchet's expectations of a broker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from ratchet_client.broker import MAX_RECORD_BYTES
from streams.kafka.clients import TOPIC_RECORD_BYTES, ensure_topics
from tests.support.broker import Broker
from tests.support.kafka import make_topics

RECORDS = 5


@pytest.fixture
def log(broker: Broker, tmp_path: Path) -> Iterator[tuple[TopicPartition, Any]]:
    """One batch of records, and a consumer of it."""
    settings = broker.settings(tmp_path, kafka={"partitions": 1})
    make_topics(settings)
    with closing(KafkaProducer(bootstrap_servers=broker.address, linger_ms=100)) as producer:
        for number in range(RECORDS):
            producer.send(settings.kafka.topic, b"record %d" % number)
        producer.flush()
    consumer = KafkaConsumer(bootstrap_servers=broker.address, auto_offset_reset="none", enable_auto_commit=False)
    partition = TopicPartition(settings.kafka.topic, 0)
    consumer.assign([partition])
    yield partition, consumer
    consumer.close(timeout_ms=1000)


def test_all_records_of_a_batch_are_read_with_their_offsets(log: Any) -> None:
    partition, consumer = log
    consumer.seek(partition, 2)
    assert [record.offset for record in consumer.poll(timeout_ms=5000)[partition]] == [2, 3, 4]


def test_topics_are_made_for_the_largest_records_and_their_headers(
    broker: Broker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka = broker.settings(tmp_path, kafka={"events_topic": f"events-{tmp_path.name}"}).kafka
    asked: dict[str, dict[str, str]] = {}
    create = KafkaAdminClient.create_topics

    def recorded(client: KafkaAdminClient, topics: Any, **options: Any) -> Any:
        asked.update({topic.name: topic.topic_configs for topic in topics})
        return create(client, topics, **options)

    monkeypatch.setattr(KafkaAdminClient, "create_topics", recorded)
    size = {"max.message.bytes": str(TOPIC_RECORD_BYTES)}
    kept = {
        kafka.topic: size, kafka.quarantine_topic: {**size, "retention.ms": "604800000"},
        kafka.events_topic: {**size, "retention.ms": "-1"},
    }  # fmt: skip
    ensure_topics(kafka, list(kept))
    assert asked == kept
    assert TOPIC_RECORD_BYTES >= MAX_RECORD_BYTES + 64 * 1024
    with closing(KafkaProducer(bootstrap_servers=kafka.bootstrap, max_request_size=MAX_RECORD_BYTES)) as producer:
        for name in kept:
            sent = producer.send(name, bytes(3_000_000), headers=[("ratchet_detail", bytes(4000))]).get(30)
            assert sent.topic == name
