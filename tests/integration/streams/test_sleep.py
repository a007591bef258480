"""A worker that was suspended (SIGSTOP) while another took over stores and publishes nothing a second time."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.settings import Settings
from streams.store.sample_store import SampleStore
from tests.support import mortal_ingest
from tests.support.broker import Broker
from tests.support.forked import ForkedProcess
from tests.support.kafka import Message, good, make_topics, produce, quarantined_places, reading, wait_for

pytestmark = pytest.mark.integration


def fall_asleep(settings: Settings, point: str) -> ForkedProcess:
    home = settings.home / "sleeper"
    home.mkdir()
    own = settings.model_copy(update={"home": home, "lake_url": settings.lake})
    process = ForkedProcess(home / "log", mortal_ingest.run_stopping, own, point)
    process.wait_until_stopped()
    return process


def sleep_through(broker: Broker, home: Path, point: str) -> None:
    """Run one case; in the end every record has one row and every quarantined record is published once."""
    home.mkdir()
    settings = broker.settings(home, kafka={"partitions": 1}, ingest={"metrics_port": 0})
    make_topics(settings)
    first: list[Message] = [good(0), (b"poison 1", []), good(1), (b"poison 3", []), good(0)]
    places = produce(settings.kafka, first)
    store = SampleStore(settings.lake)

    def done() -> bool:
        positions = list(store.positions().values())
        return [each.next for each in positions] == [each.published for each in positions] == [len(places)]

    sleeper = fall_asleep(settings, point)
    try:
        with reading(settings):
            wait_for(done, "everything stored and published by the other")
            sleeper.send_signal(signal.SIGCONT)
            places += produce(settings.kafka, [(b"poison 5", []), good(5)])
            wait_for(done, "what came later")
        sleeper.send_signal(signal.SIGTERM)
        assert sleeper.wait(60) == 0, sleeper.output()
    finally:
        sleeper.kill()
    rows = store.records().to_pylist()
    assert [(row["topic"], row["partition"], row["offset"]) for row in rows] == places
    kinds = ["sample", "quarantine", "sample", "quarantine", "duplicate", "quarantine", "sample"]
    assert [row["kind"] for row in rows] == kinds
    assert sorted(quarantined_places(settings.kafka, 3)) == [places[1], places[3], places[5]]


def test_a_worker_that_slept_while_another_took_over(broker: Broker, tmp_path: Path) -> None:
    with ThreadPoolExecutor(len(mortal_ingest.SLEEPS)) as pool:
        stories = {point: pool.submit(sleep_through, broker, tmp_path / point, point) for point in mortal_ingest.SLEEPS}
    assert {point: error for point, story in stories.items() if (error := story.exception()) is not None} == {}
