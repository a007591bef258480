"""Ingest on a real broker steps over unreadable batches; test_fuzz.py has many more kinds of them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from core.addresses import free_port
from core.settings import Settings
from streams.kafka.broker import EmbeddedBroker
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import make_topics, reading, records_seen, wait_for
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


def refused(settings: Settings, address: str, batches: Sequence[RawBatch]) -> list[dict[str, Any]]:
    """What becomes of records that are no samples."""
    make_topics(settings)
    with RawProducer(address) as producer:
        for batch in batches:
            assert producer.send(settings.kafka.topic, 0, bytes(batch.encode()))[0] == 0
    count = sum(len(batch.messages) for batch in batches)
    with reading(settings) as ingest:
        wait_for(lambda: records_seen(ingest.status) >= count, f"{count} records")
    rows = SampleStore(settings.lake).select("kind = 'quarantine'", ["offset", "reason", "detail", "original"])
    return sorted(rows, key=lambda row: row["offset"])


def test_a_damaged_batch_is_stepped_over_and_one_damaged_on_its_way_is_not_lost(tmp_path: Path) -> None:
    port, damages = free_port(), {b"always damaged": 1 << 30, b"damaged once": 1}
    batches = [[b"value 0"], [b"always damaged", b"value 2"], [b"value 3"], [b"damaged once"], [b"value 5"]]
    with (
        EmbeddedBroker(advertised=f"127.0.0.1:{port}") as embedded,
        DamagingProxy(port, embedded.address, damages) as proxy,
    ):
        settings = Broker(f"127.0.0.1:{port}", embedded=True).settings(tmp_path, {"partitions": 1})
        sent = [RawBatch([RawMessage(value) for value in values]) for values in batches]
        rows = refused(settings, embedded.address, sent)
    assert [row["offset"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert [row["offset"] for row in rows if row["reason"] == "corrupt"] == [1, 2]
    assert "checksum" in rows[1]["detail"] and b"value 2" in rows[1]["original"]
    assert rows[4]["original"] == b"damaged once" and proxy.damaged >= 3


def test_a_header_name_that_is_not_utf_8_does_not_stop_ingest(broker: Broker, tmp_path: Path) -> None:
    messages = [RawMessage(b"a"), RawMessage(b"odd", headers=[(b"\xff\xfe", b"x")]), RawMessage(b"c")]
    rows = refused(broker.settings(tmp_path), broker.address, [RawBatch(messages, 1)])
    assert [row["reason"] == "corrupt" for row in rows] == [False, True, False]
