"""Refusals are published beside the loop, by one producer for each partition however often it is claimed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any, ClassVar

import pytest

from core.settings.streams import Kafka
from streams.ingest import quarantine
from streams.ingest.membership import PartitionReader
from streams.ingest.quarantine import QuarantinePublisher
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.samples import TOPIC, refusal


class CountingSender:
    """A FencedSender that takes down which are open."""

    open_ones: ClassVar[set[CountingSender]] = set()
    sent = 0

    def __init__(self, kafka: Kafka, name: str, still_owner: Any) -> None:
        self.kafka, self.name, self.still_owner = kafka, name, still_owner

    @property
    def opened(self) -> bool:
        return self in self.open_ones

    def open(self) -> None:
        self.open_ones.add(self)

    def send_all(self, topic: str, records: list[Any]) -> list[Any]:
        CountingSender.sent += len(records)
        return [None for _ in records]

    def close(self) -> None:
        self.open_ones.discard(self)


@pytest.fixture
def publisher(store: SampleStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[QuarantinePublisher]:
    monkeypatch.setattr(quarantine, "FencedSender", CountingSender)
    monkeypatch.setattr("streams.kafka.outbox.read_back", lambda *_: [])
    monkeypatch.setattr(CountingSender, "open_ones", set())
    monkeypatch.setattr(CountingSender, "sent", 0)
    with closing(QuarantinePublisher(Kafka(), store)) as opened:
        yield opened


def test_a_partition_that_is_claimed_again_leaves_no_producer_behind(
    publisher: QuarantinePublisher, store: SampleStore
) -> None:
    writer = StoreWriter(store.table)
    for offset in range(5):
        for partition in range(2):
            [claim] = writer.claim([Position(TOPIC, partition, 0)])
            publisher.publish(PartitionReader.of(claim), [refusal(partition, offset)])
        assert publisher.wait_until_published(60)
    assert CountingSender.sent == 10
    assert len(CountingSender.open_ones) == 2
    publisher.close()
    assert not CountingSender.open_ones
