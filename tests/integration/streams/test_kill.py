"""``kill -9`` of ingest at chosen and random instants: every record is in the store or in quarantine, once."""

from __future__ import annotations

import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from core.settings import Settings
from streams.store.rows import RecordPosition
from streams.store.sample_store import SampleStore
from tests.support import mortal_ingest
from tests.support.broker import Broker
from tests.support.forked import ForkedProcess
from tests.support.kafka import Message, good, make_topics, produce, quarantined_places, wait_for

pytestmark = pytest.mark.integration

RECORDS = 80
POISON_EVERY = 3
PATIENCE = 240.0
"""Seconds, for what takes five alone: six processes start at once, in parallel with other tests."""
#: Deaths of one ingest after another on the same topic; the life after the last one finishes the work.
LIVES = {
    "before its first commit": ["claimed_but_nothing_else", "files_written_but_not_committed"],
    "between store and index": ["committed_but_index_not", "index_followed_but_not_committed"],
    "between store and quarantine": ["index_committed_but_refusals_not_published", "marking_published"],
    "while publishing refusals": ["some_refusals_of_a_batch_published", "published_but_not_marked"],
    "before Kafka is told": ["published_but_kafka_not_told"],
    "at random": ["random"] * 2,
}


def messages() -> list[Message]:
    made = [(b"poison %d" % n, []) if n % POISON_EVERY == 1 else good(n) for n in range(RECORDS)]
    return [*made, good(0)]


def start(settings: Settings, point: str) -> ForkedProcess:
    """Start an ingest with a new group, so that it need not wait until Kafka notices the death of the last one."""
    own = settings.kafka.model_copy(update={"group": f"{settings.kafka.group}-{time.monotonic_ns()}"})
    life = settings.model_copy(update={"kafka": own})
    return ForkedProcess(settings.home / "ingest.log", mortal_ingest.run, life, point)


def live_and_die(settings: Settings, point: str, chance: random.Random) -> None:
    """Run an ingest that ends with SIGKILL."""
    if point == "random":
        store = SampleStore(settings.lake)
        until = store.version() + chance.randint(1, 4)
        process = start(settings, "never")
        wait_for(lambda: store.version() >= until, f"version {until}", PATIENCE)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
    else:
        process = start(settings, point)
    assert process.wait(PATIENCE) == -signal.SIGKILL, f"it was to die at {point}:\n{process.output()}"


def finish(settings: Settings) -> None:
    log = settings.home / "ingest.log"
    before = log.stat().st_size
    process = start(settings, "never")
    store = SampleStore(settings.lake)

    def finished() -> bool:
        positions = store.positions().values()
        return sum(each.next for each in positions) == sum(each.published for each in positions) == RECORDS + 1

    try:
        wait_for(lambda: b"->" in log.read_bytes()[before:], "its first line", PATIENCE)
        wait_for(finished, "all records, and all refusals published", PATIENCE)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0, process.output()
    finally:
        process.kill()


def test_every_record_is_stored_or_quarantined_once(broker: Broker, tmp_path: Path) -> None:
    def tell(number: int, deaths: list[str]) -> None:
        home = tmp_path / str(number)
        home.mkdir()
        settings = broker.settings(home, kafka={"batch_records": 8}, ingest={"metrics_port": 0})
        make_topics(settings)
        places = produce(settings.kafka, messages())
        chance = random.Random(number)
        for point in deaths:
            live_and_die(settings, point, chance)
        finish(settings)
        check(settings, places)

    with ThreadPoolExecutor(len(LIVES)) as pool:
        stories = {
            name: pool.submit(tell, *story) for name, story in zip(LIVES, enumerate(LIVES.values()), strict=True)
        }
    failures = {name: error for name, story in stories.items() if (error := story.exception()) is not None}
    assert not failures


def check(settings: Settings, places: list[RecordPosition]) -> None:
    poison = sorted(place for number, place in enumerate(places[:RECORDS]) if number % POISON_EVERY == 1)
    records = SampleStore(settings.lake).records().to_pylist()
    kinds: dict[str, list[RecordPosition]] = {"sample": [], "duplicate": [], "quarantine": []}
    for row in records:
        kinds[row["kind"]].append((row["topic"], row["partition"], row["offset"]))
    assert sorted(place for each in kinds.values() for place in each) == sorted(places)
    assert sorted(kinds["quarantine"]) == poison
    assert len(kinds["duplicate"]) == 1
    assert sorted(quarantined_places(settings.kafka, len(poison))) == poison


def test_every_point_of_death_is_in_a_story() -> None:
    assert {point for deaths in LIVES.values() for point in deaths} - {"random"} == mortal_ingest.POINTS.keys()
