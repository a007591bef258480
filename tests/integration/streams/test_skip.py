"""An operator skips offsets: a row and an audit entry record it, and a running worker continues after them."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.errors import RatchetError, RecordError, SkipRefused
from core.ledger import Ledger
from core.settings import Settings
from streams.ingest.resubmit import skip
from streams.store.sample_queries import trace
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import good, make_topics, produce, reading, wait_for


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    found = broker.settings(tmp_path, {"partitions": 1, "batch_seconds": 600, "batch_records": 12})
    make_topics(found)
    return found


def send(settings: Settings, *seeds: int) -> None:
    """Send records in batches of one, so that the embedded broker's end offset is right."""
    for seed in seeds:
        produce(settings.kafka, [good(seed)])


def test_a_running_worker_goes_on_behind_what_was_skipped(settings: Settings, ledger: Ledger) -> None:
    store, topic = SampleStore(settings.lake), settings.kafka.topic

    def epoch() -> int:
        position = store.positions().get(f"{topic}:0")
        return 0 if position is None else position.epoch

    with reading(settings):
        wait_for(lambda: epoch() == 1, "the worker's claim")
        send(settings, *range(10))  # too few for a commit
        skipped = skip(settings, ledger, f"{topic}:0", 6, actor="ann", reason="test data")
        assert (skipped.start, skipped.until, epoch()) == (0, 6, 2)
        send(settings, 10, 11)  # enough: the worker finds out
        wait_for(lambda: epoch() == 3, "the worker's second claim")
        send(settings, *range(12, 18))
        wait_for(lambda: store.count() == 12, "the samples behind the gap")
    assert store.scan(columns=["offset"])["offset"].to_pylist() == list(range(6, 18))
    [lost] = trace(store, (topic, 0, 5))
    assert (lost.outcome, lost.reason, lost.detail) == ("lost", "skipped", "6 offsets: skipped by ann: test data")
    assert store.tally()["gap_offsets"] == 6
    [row] = ledger.audit_rows()
    assert (row.actor, row.action, row.subject) == ("ann", "skip", f"partition {topic}:0")
    assert row.detail == {"reason": "test data", "stream": topic, "from": 0, "to": 6}


def test_only_what_lies_ahead_in_the_log_can_be_skipped(settings: Settings, ledger: Ledger) -> None:
    topic = settings.kafka.topic
    send(settings, 1, 2, 3)

    def refused(partition: str, to: int, error: type[RatchetError], match: str) -> None:
        with pytest.raises(error, match=match):
            skip(settings, ledger, partition, to, actor="ann", reason="r")

    refused(f"{topic}:0", 4, SkipRefused, "ends at offset 3")
    refused(f"{topic}:9", 1, SkipRefused, "no partition 9")
    refused("other:0", 1, RecordError, f"reads the topic {topic}, not other")
    refused("x", 1, RecordError, "is not a partition")
    assert ledger.audit_rows() == []
    assert SampleStore(settings.lake).positions() == {}
    assert skip(settings, ledger, f"{topic}:0", 3, actor="ann", reason="r").until == 3  # before it was read
    for backwards in (3, 1):
        refused(f"{topic}:0", backwards, SkipRefused, "has been read up to offset 3 already")
    assert SampleStore(settings.lake).offsets() == {f"{topic}:0": 3}
