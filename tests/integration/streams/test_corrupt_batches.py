"""A real consumer on a real broker steps over unreadable batches; test_fuzz.py has many more kinds of them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kafka import KafkaConsumer, TopicPartition

from core.addresses import free_port
from streams.kafka.broker import EmbeddedBroker
from streams.kafka.tolerant_fetch import Corrupt, install
from tests.support.broker import Broker
from tests.support.kafka import make_topics, wait_for
from tests.support.raw_batches import RawBatch, RawMessage, RawProducer
from tests.support.tcp_relay import TcpRelay, end_link


class DamagingProxy(TcpRelay):
    """Corrupts values on their way from a broker, which sends its clients here."""

    def __init__(self, port: int, target: str, damages: dict[bytes, int]) -> None:
        """``damages``: how many occurrences of a value have their first bit flipped."""
        super().__init__(port, target)
        self.damages, self.damaged = damages, 0

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        if source.getpeername() != self.target:
            return super()._relay(source, sink)
        with suppress(OSError), source.makefile("rb") as stream:
            while size := stream.read(4):
                sink.sendall(size + self._damaged(stream.read(int.from_bytes(size))))
        return end_link(source, sink)

    def _damaged(self, answer: bytes) -> bytes:
        for value, times in self.damages.items():
            found = min(times, answer.count(value))
            answer = answer.replace(value, bytes([value[0] ^ 1]) + value[1:], found)
            self.damages[value] -= found
            self.damaged += found
        return answer


def read(address: str, topic: str, count: int) -> list[Any]:
    """Poll partition 0 from its beginning until it has this many offsets."""
    consumer = KafkaConsumer(
        bootstrap_servers=address, auto_offset_reset="none", enable_auto_commit=False, isolation_level="read_committed"
    )
    install(consumer)
    partition = TopicPartition(topic, 0)
    consumer.assign([partition])
    consumer.seek(partition, 0)
    found: list[Any] = []

    def polled() -> bool:
        found.extend(each for records in consumer.poll(timeout_ms=500).values() for each in records)
        return len(found) >= count

    try:
        wait_for(polled, f"{count} offsets", 30)
        assert consumer.position(partition) == found[-1].offset + 1
    finally:
        consumer.close()
    return found


def send(address: str, topic: str, batches: Sequence[RawBatch]) -> None:
    with RawProducer(address) as producer:
        for batch in batches:
            assert producer.send(topic, 0, bytes(batch.encode()))[0] == 0


def test_a_damaged_batch_is_stepped_over_and_one_damaged_on_its_way_is_not_lost() -> None:
    port = free_port()
    batches = [[b"value 0"], [b"always damaged", b"value 2"], [b"value 3"], [b"damaged once"], [b"value 5"]]
    damages = {b"always damaged": 1 << 30, b"damaged once": 1}
    with (
        EmbeddedBroker(advertised=f"127.0.0.1:{port}") as embedded,
        DamagingProxy(port, embedded.address, damages) as proxy,
    ):
        embedded.ensure_topics(["samples"])
        send(embedded.address, "samples", [RawBatch([RawMessage(value) for value in values]) for values in batches])
        records = read(f"127.0.0.1:{port}", "samples", 6)
    assert [each.offset for each in records] == [0, 1, 2, 3, 4, 5]
    assert [each.offset for each in records if isinstance(each, Corrupt)] == [1, 2]
    assert "checksum" in records[1].detail and b"value 2" in records[1].raw
    assert records[4].value == b"damaged once" and proxy.damaged >= 3


def test_a_header_name_that_is_not_utf_8_does_not_stop_the_consumer(broker: Broker, tmp_path: Path) -> None:
    settings = broker.settings(tmp_path)
    make_topics(settings)
    messages = [RawMessage(b"a"), RawMessage(b"odd", headers=[(b"\xff\xfe", b"x")]), RawMessage(b"c")]
    send(broker.address, settings.kafka.topic, [RawBatch(messages, 1)])
    records = read(broker.address, settings.kafka.topic, 3)
    assert [type(each).__name__ for each in records] == ["ConsumerRecord", "Corrupt", "ConsumerRecord"]
