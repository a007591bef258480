"""Topics that others have created."""

from __future__ import annotations

from pathlib import Path

import pytest
from kafka import KafkaProducer

from tests.support.broker import Broker
from tests.support.kafka import reading, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.kafka]


def test_a_topic_that_a_producers_first_record_made_is_warned_of(
    broker: Broker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = broker.settings(tmp_path)
    topic = settings.kafka.topic
    producer = KafkaProducer(bootstrap_servers=broker.address)
    producer.send(topic, b"no picture").get(30)
    producer.close(5)
    with reading(settings) as ingest:
        wait_for(lambda: ingest.status.quarantined == 1, "the record")
    said = [each for each in caplog.messages if each.startswith(f"topic {topic} ")]
    assert len(said) == 2 and "at most 1,048,588 bytes" in said[0] and "1 partition(s)" in said[1]
    assert not [each for each in caplog.messages if each.startswith(f"topic {settings.kafka.quarantine_topic} takes")]
