"""The duplicate index is built beside the loop: nothing is claimed before it is there, and a stop does not wait."""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest

from core.errors import StoreUnavailable
from core.settings import Settings
from streams.ingest import duplicates as module
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.perceptual_hash import SplitRule
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.fake_kafka import FakeKafka
from tests.support.kafka import good, reading, wait_for
from tests.support.samples import TOPIC, put, sample


class SlowTable:
    """Holds up every reading of the store into an index until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.released, self.failures = threading.Event(), threading.Event(), 0
        follow = DuplicateIndex.follow

        def slow(index: DuplicateIndex, table: Any) -> None:
            self.reading.set()
            assert self.released.wait(60)
            if self.failures:
                self.failures -= 1
                raise StoreUnavailable("away", "wait")
            follow(index, table)

        monkeypatch.setattr(DuplicateIndex, "follow", slow)


def test_the_group_is_joined_and_nothing_is_claimed_while_the_index_is_built(
    settings: Settings, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowTable(monkeypatch)
    kafka.send(good(1))
    with reading(settings) as consumer:
        assert slow.reading.wait(20)
        polls = kafka.polls
        wait_for(lambda: kafka.polls > polls + 5, "polls while the index is built", 20)
        assert SampleStore(settings.lake).positions() == {}
        slow.released.set()
        wait_for(lambda: consumer.status.samples == 1, "the record", 20)


def test_an_index_that_cannot_be_built_is_tried_again(
    settings: Settings, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowTable(monkeypatch)
    slow.failures = 2
    slow.released.set()
    kafka.send(good(1))
    with reading(settings) as consumer:
        wait_for(lambda: consumer.status.samples == 1, "the record", 20)
    assert slow.failures == 0


def test_a_stop_does_not_wait_for_the_index_and_leaves_it_as_it_was(
    settings: Settings, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SampleStore(settings.lake)
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    begun, over, batches = threading.Event(), threading.Event(), module._batches

    def endless(dataset: Any, fragment: Any) -> Any:
        while not over.is_set():
            yield from batches(dataset, fragment)
            begun.set()

    monkeypatch.setattr(module, "_batches", endless)
    try:
        with reading(settings):
            assert begun.wait(20)
    finally:
        over.set()
    name, key = store.table.identity()
    split = SplitRule(key, settings.ingest.fresh_eval_share)
    with closing(DuplicateIndex(settings.home / "ingest/duplicates.db", name, module.OFF, split)) as index:
        assert len(index) == 0
