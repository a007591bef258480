"""A real consumer on a real broker steps over unreadable batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer, TopicPartition

from core.addresses import free_port
from streams.kafka.broker import EmbeddedBroker
from streams.kafka.tolerant_fetch import Corrupt, install
from tests.support.broker import Broker
from tests.support.damage import DamagingProxy
from tests.support.fuzz_records import publish_mutated
from tests.support.kafka import make_topics, wait_for
from tests.support.raw_batches import RawBatch, RawMessage, RawProducer

pytestmark = pytest.mark.integration


@contextmanager
def reading(address: str, topic: str) -> Iterator[Callable[[int], list[Any]]]:
    """A function that polls partition 0 from its beginning until it has this many offsets."""
    consumer = KafkaConsumer(
        bootstrap_servers=address, auto_offset_reset="none", enable_auto_commit=False, isolation_level="read_committed"
    )
    install(consumer)
    partition = TopicPartition(topic, 0)
    consumer.assign([partition])
    consumer.seek(partition, 0)
    found: list[Any] = []

    def until(count: int) -> list[Any]:
        def polled() -> bool:
            found.extend(each for records in consumer.poll(timeout_ms=500).values() for each in records)
            return len(found) >= count

        wait_for(polled, f"{count} offsets", 30)
        assert consumer.position(partition) == found[-1].offset + 1
        return found

    try:
        yield until
    finally:
        consumer.close()


def batch(*values: bytes, codec: int = 0) -> bytearray:
    return RawBatch([RawMessage(value) for value in values], codec).encode()


def test_a_damaged_batch_is_stepped_over_and_one_damaged_on_its_way_is_not_lost() -> None:
    port = free_port()
    batches = [[b"value 0"], [b"always damaged", b"value 2"], [b"value 3"], [b"damaged once"], [b"value 5"]]
    with EmbeddedBroker(advertised=f"127.0.0.1:{port}") as embedded, DamagingProxy(port, embedded.address) as proxy:
        proxy.damage(b"always damaged")
        proxy.damage(b"damaged once", times=1)
        embedded.ensure_topics(["samples"])
        with RawProducer(embedded.address) as producer:
            for values in batches:
                assert producer.send("samples", 0, batch(*values))[0] == 0
        with reading(f"127.0.0.1:{port}", "samples") as until:
            records = until(6)
    assert [each.offset for each in records] == [0, 1, 2, 3, 4, 5]
    assert [each.offset for each in records if isinstance(each, Corrupt)] == [1, 2]
    assert "checksum" in records[1].detail and b"value 2" in records[1].raw
    assert records[4].value == b"damaged once" and proxy.damaged >= 3


def test_a_header_name_that_is_not_utf_8_does_not_stop_the_consumer(broker: Broker, tmp_path: Path) -> None:
    settings = broker.settings(tmp_path)
    make_topics(settings)
    odd = RawMessage(b"odd", headers=[(b"\xff\xfe", b"x")])
    with RawProducer(broker.address) as producer:
        code, base = producer.send(
            settings.kafka.topic, 0, RawBatch([RawMessage(b"a"), odd, RawMessage(b"c")], 1).encode()
        )
    assert (code, base) == (0, 0)
    with reading(broker.address, settings.kafka.topic) as until:
        records = until(3)
    assert [type(each).__name__ for each in records] == ["ConsumerRecord", "Corrupt", "ConsumerRecord"]


def test_mutated_records_come_out_once_each_as_what_they_must_be(broker: Broker, tmp_path: Path) -> None:
    settings = broker.settings(tmp_path, kafka={"partitions": 1})
    make_topics(settings)
    sent = publish_mutated(settings.kafka, 1_500, seed=3)
    with reading(broker.address, settings.kafka.topic) as until:
        records = until(len(sent.records))
    assert [each.offset for each in records] == sorted(offset for _, offset in sent.records)
    found = {(each.partition, each.offset): each for each in records}
    assert all(isinstance(found[at], Corrupt) for at in sent.corrupt)
    assert len(sent.corrupt) + len(sent.refused) > 50  # Apache Kafka refuses some batches
    assert all(found[at].value == sent.records[at].message.value for at in sent.valid.values())
