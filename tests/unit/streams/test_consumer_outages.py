"""The consumer waits for unavailable dependencies, names them, and loses nothing; records that kill its process are
refused.
"""

from __future__ import annotations

import threading
from contextlib import closing
from typing import Any

import pytest

from core.errors import BrokerError, RegistryUnavailable, StoreFull, StoreUnavailable
from core.settings import Settings
from streams.ingest import consumer as consumers
from streams.ingest import duplicates, ingest_report, validators
from streams.ingest.duplicates import DuplicateIndex
from streams.ingest.perceptual_hash import SplitRule
from streams.ingest.validate import Received, validate
from streams.ingest.validators import DEATHS
from streams.store.rows import Position, SampleTable
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.consumer import POISON, dependency_state, metric
from tests.support.fake_kafka import FakeConsumer, FakeKafka
from tests.support.kafka import good, reading, wait_for
from tests.support.samples import TOPIC, put, sample
from tests.unit.streams.conftest import Ingestion, Outage
from tests.unit.streams.test_validate import die


@pytest.mark.parametrize("kafka", [2], indirect=True)
def test_the_lag_of_a_revoked_partition_goes_and_is_unknown_while_joining(settings: Settings, kafka: FakeKafka) -> None:
    kafka.assign()
    lags: list[tuple[str, int | None]] = []
    for number in range(2):
        kafka.send(good(number), partition=number)
    with reading(settings, lambda status: lags.append((status.state, status.lag))) as consumer:
        wait_for(lambda: consumer.status.state == "joining", "joining", 20)
        kafka.assign(0, 1)
        wait_for(lambda: metric("lag_records", partition="1") == 0, "a lag of 0", 20)
        assert metric("lag_records", partition="0") == 0
        kafka.assign(0)
        wait_for(lambda: metric("lag_records", partition="1") is None, "the lag is gone", 20)
        wait_for(lambda: metric("lag_records", partition="0") == 0, "the other's is there again", 20)
        assert metric("lag_records", partition="1") is None
    assert {lag for state, lag in lags if state == "joining"} == {None}
    assert metric("lag_records", partition="0") is None


# -- outages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "dependency", "state"),
    [
        (StoreFull("the disk is full"), "store", "full"),
        (StoreUnavailable("no such bucket", state="refused"), "store", "refused"),
        (OSError("broken pipe"), "broker", "away"),
    ],
)
@pytest.mark.parametrize("step", ["commit", "claim"])
def test_what_is_away_is_named_and_waited_for_and_nothing_is_lost(
    ingestion: Ingestion, kafka: FakeKafka, outage: Outage, error: Exception, dependency: str, state: str, step: str
) -> None:
    away = outage(StoreWriter, step, error)
    kafka.send(good(1), POISON, good(2))
    with ingestion.run() as consumer:
        wait_for(lambda: consumer.status.waiting_for == dependency, dependency, 20)
        assert consumer.status.state == "waiting" and str(error) in consumer.status.problem
        assert (metric("waiting", **{"for": dependency}), dependency_state(dependency)) == (1, state)
        away.clear()
        kafka.send(good(3))
        ingestion.wait_for(4)
        wait_for(lambda: consumer.status.state == "reading", "reading again", 20)
        assert (consumer.status.waiting_for, consumer.status.problem) == ("", "")
        assert (metric("waiting", **{"for": dependency}), dependency_state(dependency)) == (0, "ok")
    assert ingestion.kinds() == ["sample", "quarantine", "sample", "sample"]
    assert kafka.names() == ["t:0:1"]


def test_a_broker_that_refuses_names_the_rights_that_are_missing(
    ingestion: Ingestion, outage: Outage, kafka: FakeKafka
) -> None:
    away = outage(FakeConsumer, "poll", BrokerError("not authorized", state="refused"))
    outage(consumers, "check_rights", BrokerError("READ of group g is missing", state="refused"))
    with ingestion.run() as consumer:
        wait_for(lambda: "READ of group g is missing" in consumer.status.problem, "the missing right", 20)
        away.clear()
        kafka.send(good(1))
        ingestion.wait_for(1)


def test_a_store_that_hangs_or_is_away_is_told_while_the_consumer_waits_for_it_or_is_idle(
    ingestion: Ingestion, kafka: FakeKafka, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance retries for minutes, and the thread that reads the topic waits for it."""
    monkeypatch.setattr(ingest_report, "STORE_SECONDS", 0.2)
    hangs, answers = threading.Event(), threading.Event()
    real = SampleTable.open

    def silent(self: SampleTable, version: int | None = None) -> Any:
        if hangs.is_set():
            answers.wait(60)
        return real(self, version)

    monkeypatch.setattr(SampleTable, "open", silent)
    away = outage(SampleStore, "version", StoreUnavailable("no route to the store."))
    away.clear()
    kafka.send(good(1))
    with ingestion.run(1) as consumer:
        hangs.set()
        kafka.send(good(2))
        wait_for(lambda: metric("waiting", **{"for": "store"}) == 1, "the outage", 20)
        assert (consumer.status.waiting_for, dependency_state("store")) == ("store", "slow")
        assert "does not answer" in consumer.status.problem
        hangs.clear()
        answers.set()
        ingestion.wait_for(2)
        wait_for(lambda: consumer.status.state == "reading" and dependency_state("store") == "ok", "the end", 20)
        assert metric("waiting", **{"for": "store"}) == 0
        away.set()
        wait_for(lambda: consumer.status.waiting_for == "store", "the outage of an idle ingest", 20)
        assert (dependency_state("store"), dependency_state("broker")) == ("away", "ok")
        polls = kafka.polls
        wait_for(lambda: kafka.polls > polls + 20, "it asks the broker on and on", 20)
        assert consumer.status.state == "waiting", "what the broker answers says nothing of the store"
        away.clear()
        wait_for(lambda: consumer.status.state == "reading", "the end of the outage", 20)


def test_one_that_is_asked_to_stop_while_the_store_takes_nothing_tries_no_more(
    ingestion: Ingestion, kafka: FakeKafka, outage: Outage
) -> None:
    """An attempt takes as long as Lance's own retries, and a process is killed a minute after it was asked to stop."""
    kafka.send(good(1), POISON)
    attempts = []
    with ingestion.run(2) as consumer:

        def stopped_meanwhile(*_: Any) -> bool:
            consumer.stop()
            attempts.append(1)
            return True

        away = outage(StoreWriter, "_commit", StoreUnavailable("away"), stopped_meanwhile)
        kafka.send(good(2))
        wait_for(lambda: consumer.status.state == "stopped", "it ends", 20)
    assert attempts == [1]
    away.clear()
    with ingestion.run():
        ingestion.wait_for(3)
    assert ingestion.kinds() == ["sample", "quarantine", "sample"]


def test_one_that_is_asked_to_stop_before_a_cut_off_log_is_stored_begins_no_generation(
    ingestion: Ingestion, kafka: FakeKafka, outage: Outage
) -> None:
    kafka.send(good(1), epoch=3)
    begun: list[str] = []
    outage(
        StoreWriter, "claim", StoreUnavailable("never"), lambda _, starts, *__: begun.extend(s.stream for s in starts)
    )
    settings = ingestion.settings
    ingestion.settings = settings.model_copy(update={"kafka": settings.kafka.model_copy(update={"batch_seconds": 100})})
    with ingestion.run() as consumer:
        wait_for(lambda: len(getattr(consumer, "_batch", ())) == 1, "a record that is not stored yet", 20)
        outage(StoreWriter, "commit", StoreUnavailable("away"))
        with kafka.changed:
            kafka.cut_off(0)
            kafka.send(good(2), epoch=4)
        wait_for(lambda: consumer.status.state == "waiting", "it waits", 20)
        consumer.stop()
        wait_for(lambda: consumer.status.state == "stopped", "it ends", 20)
    assert set(begun) == {"t"} and ingestion.store.offsets() == {"t:0": 0}


def test_a_registry_and_a_broker_that_are_away_at_once_do_not_end_it(
    ingestion: Ingestion, kafka: FakeKafka, outage: Outage
) -> None:
    away = outage(
        validators, "validate", RegistryUnavailable("the registry is away."), lambda received, _: received.offset == 1
    )
    kafka.send(good(0), good(1), good(2), POISON)
    with ingestion.run() as consumer:
        wait_for(lambda: consumer.status.waiting_for == "registry", "the registry's outage", 20)
        kafka.away = True
        wait_for(lambda: consumer.status.waiting_for == "broker", "the broker's outage", 20)
        kafka.away = False
        wait_for(lambda: consumer.status.waiting_for == "registry", "the registry's outage again", 20)
        away.clear()
        ingestion.wait_for(4)
    assert ingestion.kinds() == ["sample", "sample", "sample", "quarantine"]
    assert kafka.names() == ["t:0:3"]


def test_a_gap_waits_for_the_records_before_it(ingestion: Ingestion, kafka: FakeKafka, outage: Outage) -> None:
    """A record waits while the registry is down; a gap that retention makes behind it must not be stored before it."""
    away = outage(
        validators, "validate", RegistryUnavailable("the registry is away."), lambda received, _: received.offset == 0
    )
    kafka.send(good(0), good(1))
    with ingestion.run() as consumer:
        wait_for(lambda: consumer.status.waiting_for == "registry", "the outage", 20)
        with kafka.changed:
            kafka.send(*(good(n) for n in range(2, 6)))
            kafka.delete_before(5)
        polls = kafka.polls
        wait_for(lambda: kafka.polls > polls + 20, "it looks again and again", 20)
        assert ingestion.store.offsets() == {"t:0": 0}
        away.clear()
        ingestion.wait_for(3)
    assert ingestion.rows() == [("t", 0, "sample"), ("t", 1, "sample"), ("t", 2, "gap"), ("t", 5, "sample")]


def test_one_that_lost_its_partition_claims_it_anew_and_stores_and_publishes_nothing_twice(
    ingestion: Ingestion, kafka: FakeKafka
) -> None:
    kafka.send(good(1), POISON)
    with ingestion.run(2):
        wait_for(lambda: ingestion.position().published == 2, "the refusal published", 20)
        other = StoreWriter(SampleTable(ingestion.settings.lake))
        for number in (4, 6, 8):
            other.claim([ingestion.position()])
            kafka.send(good(number), POISON)
            ingestion.wait_for(number)
        wait_for(lambda: ingestion.position().published == 8, "all published", 20)
        kafka.quarantine_away = True
        kafka.send(good(10), POISON)
        ingestion.wait_for(10)
        other.claim([ingestion.position()])
        kafka.quarantine_away = False
        wait_for(lambda: ingestion.position().published == 10, "what waited, though no record comes", 20)
    assert ingestion.kinds() == ["sample", "quarantine"] * 5
    assert kafka.names() == [f"t:0:{n}" for n in (1, 3, 5, 7, 9)]


# -- the duplicate index, which is built in parallel with the loop --------------------------------------------------


def test_the_group_is_joined_and_nothing_is_claimed_while_the_index_is_built_or_tried_again(
    settings: Settings, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, released, follow = threading.Event(), threading.Event(), DuplicateIndex.follow
    tries: list[Any] = []

    def slow(*given: Any) -> Any:
        tries.append(given)
        if len(tries) < 3:
            raise StoreUnavailable("away")
        begun.set()
        assert released.wait(60)
        return follow(*given)

    monkeypatch.setattr(DuplicateIndex, "follow", slow)
    kafka.send(good(1))
    with reading(settings) as consumer:
        assert begun.wait(20)
        polls = kafka.polls
        wait_for(lambda: kafka.polls > polls + 5, "polls while the index is built", 20)
        assert SampleStore(settings.lake).positions() == {}
        released.set()
        wait_for(lambda: consumer.status.samples == 1, "the record", 20)


def test_a_stop_does_not_wait_for_the_index_and_leaves_it_as_it_was(
    settings: Settings, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SampleStore(settings.lake)
    put(store, [sample(0, 0)], Position(TOPIC, 0, 1))
    begun, over, batches = threading.Event(), threading.Event(), duplicates._batches

    def endless(dataset: Any, fragment: Any) -> Any:
        while not over.is_set():
            yield from batches(dataset, fragment)
            begun.set()

    monkeypatch.setattr(duplicates, "_batches", endless)
    try:
        with reading(settings):
            assert begun.wait(20)
    finally:
        over.set()
    name, key = store.table.identity()
    split = SplitRule(key, settings.ingest.fresh_eval_share)
    with closing(DuplicateIndex(settings.home / "ingest/duplicates.db", name, duplicates.OFF, split)) as index:
        assert len(index) == 0


# -- records that kill ---------------------------------------------------------------------------------------------


def test_a_record_at_which_the_process_died_three_times_is_refused_and_its_neighbours_are_stored(
    ingestion: Ingestion, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that were being validated at the first death are validated alone from then on, so that only one can die
    again.
    """
    names = [("t", 0, number) for number in range(4)]
    home = ingestion.settings.home / "ingest"
    die(home, *names)
    for _ in range(DEATHS - 1):
        die(home, names[2])
    inside: set[int] = set()
    together: list[set[int]] = []

    def watch(received: Received, rules: Any) -> Any:
        inside.add(received.offset)
        together.append(set(inside))
        result = validate(received, rules)
        inside.discard(received.offset)
        return result

    monkeypatch.setattr(validators, "validate", watch)
    kafka.send(*(good(n) for n in range(8)))
    ingestion.finish(8)
    assert ingestion.kinds() == ["sample", "sample", "quarantine", *["sample"] * 5]
    refused = ingestion.store.quarantined_record("t", 0, 2)
    assert refused is not None and (refused["reason"], refused["original"]) == ("crashed", good(2)[0])
    assert "3 times" in refused["detail"] and kafka.names() == ["t:0:2"]
    assert not any(2 in each for each in together), "it was validated once more"
    assert [each for each in together if each & {0, 1, 3}] == [{0}, {1}, {3}]
    assert not (home / "crashes.json").read_text().strip("{}"), "all are stored, and forgotten"
