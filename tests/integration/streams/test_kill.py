"""Ingest that is killed, or sleeps while another takes over: every record is in the store or in quarantine, once."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from core.settings import Settings
from streams.store.rows import RecordPosition, position_of
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.forked import ForkedProcess
from tests.support.kafka import Message, good, make_topics, produce, quarantined_places, reading, wait_for
from tests.support.mortal_streams import DEATHS, SLEEPS, ingest

PATIENCE = 240.0
"""Seconds, for what takes five alone: six processes start at once, in parallel with other tests."""
#: Deaths of one ingest after another on the same topic; the life after the last one finishes the work.
LIVES = {
    "before its first commit": ("claimed_but_nothing_else", "files_written_but_not_committed"),
    "between store and index": ("committed_but_index_not", "index_followed_but_not_committed"),
    "between store and quarantine": ("index_committed_but_refusals_not_published", "marking_published"),
    "while publishing refusals": ("some_refusals_of_a_batch_published", "published_but_not_marked"),
    "before Kafka is told": ("published_but_kafka_not_told",),
    "at random": ("random", "random"),
}


def all_at_once(tell: Callable[[str, Any], None], stories: Mapping[str, Any]) -> None:
    with ThreadPoolExecutor(len(stories)) as pool:
        told = {name: pool.submit(tell, name, story) for name, story in stories.items()}
    assert {name: error for name, each in told.items() if (error := each.exception()) is not None} == {}


def is_done(store: SampleStore, count: int) -> bool:
    positions = store.positions().values()
    return sum(each.next for each in positions) == sum(each.published for each in positions) == count


def start(settings: Settings, point: str = "") -> ForkedProcess:
    """Start an ingest with a new group, so that it need not wait until Kafka notices the death of the last one."""
    own = settings.kafka.model_copy(update={"group": f"{settings.kafka.group}-{time.monotonic_ns()}"})
    return ForkedProcess(settings.home / "ingest.log", ingest, settings.model_copy(update={"kafka": own}), point)


def live_and_die(settings: Settings, point: str, chance: random.Random) -> None:
    """Run an ingest that ends with SIGKILL."""
    if point == "random":
        store = SampleStore(settings.lake)
        until = store.version() + chance.randint(1, 4)
        process = start(settings)
        wait_for(lambda: store.version() >= until, f"version {until}", PATIENCE)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
    else:
        process = start(settings, point)
    assert process.wait(PATIENCE) == -signal.SIGKILL, f"it was to die at {point}:\n{process.output()}"


def finish(settings: Settings, count: int) -> None:
    log = settings.home / "ingest.log"
    before = log.stat().st_size
    process, store = start(settings), SampleStore(settings.lake)
    try:
        wait_for(lambda: b"->" in log.read_bytes()[before:], "its first line", PATIENCE)
        wait_for(lambda: is_done(store, count), "all records, and all refusals published", PATIENCE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, process.output()
    finally:
        process.kill()


def test_every_record_is_stored_or_quarantined_once_wherever_ingest_is_killed(broker: Broker, tmp_path: Path) -> None:
    assert {point for deaths in LIVES.values() for point in deaths} - {"random"} == DEATHS.keys()
    poisoned = [number % 3 == 1 for number in range(80)]
    messages = [(b"poison %d" % n, []) if poison else good(n) for n, poison in enumerate(poisoned)]

    def live(name: str, deaths: tuple[str, ...]) -> None:
        home = tmp_path / name.replace(" ", "-")
        home.mkdir()
        settings = broker.settings(home, kafka={"batch_records": 8}, ingest={"metrics_port": 0})
        make_topics(settings)
        places = produce(settings.kafka, [*messages, good(0)])
        chance = random.Random(name)
        for point in deaths:
            live_and_die(settings, point, chance)
        finish(settings, len(places))
        poison = sorted(place for place, bad in zip(places, poisoned, strict=False) if bad)
        kinds: dict[str, list[RecordPosition]] = {"sample": [], "duplicate": [], "quarantine": []}
        for row in SampleStore(settings.lake).records().to_pylist():
            kinds[row["kind"]].append(position_of(row))
        assert sorted(place for each in kinds.values() for place in each) == sorted(places)
        assert sorted(kinds["quarantine"]) == poison
        assert len(kinds["duplicate"]) == 1
        assert sorted(quarantined_places(settings.kafka, len(poison))) == poison

    all_at_once(live, LIVES)


def test_a_worker_that_slept_while_another_took_over_stores_and_publishes_nothing_again(
    broker: Broker, tmp_path: Path
) -> None:
    def sleep_through(point: str, _: object) -> None:
        home = tmp_path / point / "sleeper"
        home.mkdir(parents=True)
        settings = broker.settings(home.parent, kafka={"partitions": 1}, ingest={"metrics_port": 0})
        make_topics(settings)
        first: list[Message] = [good(0), (b"poison 1", []), good(1), (b"poison 3", []), good(0)]
        places = produce(settings.kafka, first)
        store = SampleStore(settings.lake)
        own = settings.model_copy(update={"home": home, "lake_url": settings.lake})
        sleeper = ForkedProcess(home / "log", ingest, own, point)
        try:
            sleeper.wait_until_stopped()
            with reading(settings):
                wait_for(lambda: is_done(store, len(places)), "everything stored and published by the other")
                sleeper.send_signal(signal.SIGCONT)
                places += produce(settings.kafka, [(b"poison 5", []), good(5)])
                wait_for(lambda: is_done(store, len(places)), "what came later")
            sleeper.send_signal(signal.SIGTERM)
            assert sleeper.wait(60) == 0, sleeper.output()
        finally:
            sleeper.kill()
        rows = store.records().to_pylist()
        assert [position_of(row) for row in rows] == places
        kinds = ["sample", "quarantine", "sample", "quarantine", "duplicate", "quarantine", "sample"]
        assert [row["kind"] for row in rows] == kinds
        assert sorted(quarantined_places(settings.kafka, 3)) == [places[1], places[3], places[5]]

    all_at_once(sleep_through, SLEEPS)
