"""The consumer loses nothing and stores nothing twice, whatever happens to the log, the store, the disk or a record."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from core.errors import BrokerError, RegistryUnavailable, StoreFull, StoreUnavailable
from core.settings import Settings
from streams.ingest import consumer as module
from streams.ingest import ingest_report, validators
from streams.ingest.consumer import Consumer
from streams.ingest.membership import Reading
from streams.ingest.quarantine import RefusalPublisher
from streams.ingest.validate import Received, validate
from streams.ingest.validators import DEATHS
from streams.kafka import tolerant_fetch
from streams.store.rows import Position, SampleTable
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.fake_kafka import FakeConsumer, FakeKafka, FakeSender, install
from tests.support.kafka import Message, good, reading, records_seen, wait_for
from tests.support.samples import refusal
from tests.unit.streams.test_crash_guard import die

POISON: Message = (b"poison", [])


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    kafka = {"topic": "t", "batch_seconds": 0.02, "bootstrap": "127.0.0.1:1"}
    return Settings(home=tmp_path, kafka=kafka, ingest={"processes": 2})


@pytest.fixture
def store(settings: Settings) -> SampleStore:
    return SampleStore(settings.lake)


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> FakeKafka:
    broker = FakeKafka("t")
    install(broker, monkeypatch)
    monkeypatch.setattr(module, "BACKOFF_SECONDS", (0.02,))
    monkeypatch.setattr("streams.ingest.quarantine.BACKOFF_SECONDS", (0.02,))
    monkeypatch.setattr("streams.ingest.membership.LogWatch.SECONDS", 0.0)
    return broker


@contextmanager
def run(settings: Settings, wanted: int = 0) -> Iterator[Consumer]:
    """A consumer that has seen so many records."""
    with reading(settings) as consumer:
        wait_for(lambda: records_seen(consumer.status) >= wanted, f"{wanted} records", 20)
        yield consumer


def rows(store: SampleStore) -> list[tuple[str, int, str]]:
    """Stream, offset and kind of every row, one partition after another."""
    return [(row["topic"], row["offset"], row["kind"]) for row in store.records().to_pylist()]


def metric(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_ingest_{name}", labels)


def dependency_state(name: str) -> str | None:
    """The word for a dependency in this process's metrics."""
    states = {each: REGISTRY.get_sample_value("ratchet_dependency_state", {"dependency": name, "state": each})
              for each in ("ok", "away", "slow", "refused", "full")}  # fmt: skip
    return next((state for state, value in states.items() if value), None)


def seen(store: SampleStore, count: int) -> None:
    wait_for(
        lambda: sum(store.tally()[kind] for kind in ("sample", "duplicate", "quarantine")) >= count, f"{count}", 20
    )


# -- the plain path ------------------------------------------------------------------------------------------------


def test_each_record_has_one_row_and_each_refusal_is_published_once(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.send(good(1), POISON, good(1), good(2), POISON)
    with run(settings, 5):
        pass
    assert rows(store) == list(
        zip("ttttt", range(5), ["sample", "quarantine", "duplicate", "sample", "quarantine"], strict=True)
    )
    assert kafka.names() == ["t:0:1", "t:0:4"]
    assert kafka.committed == {0: 5}
    position = store.positions()["t:0"]
    assert (position.next, position.published) == (5, 5), "what was published is remembered"
    with run(settings):
        kafka.send(good(3))
        seen(store, 6)
    assert kafka.names() == ["t:0:1", "t:0:4"]


@pytest.mark.parametrize("hidden", [1, 1_000])
def test_offsets_without_a_record_are_neither_lag_nor_lost(
    settings: Settings, store: SampleStore, kafka: FakeKafka, hidden: int
) -> None:
    """Markers of transactions, aborted records: nothing is read of them, and retention deletes them."""
    kafka.send(good(1), POISON)
    kafka.skip(hidden, epoch=1)
    with run(settings, 2) as consumer:
        wait_for(lambda: store.positions()["t:0"].published == 2 + hidden, "the position is behind them", 20)
        wait_for(lambda: consumer.status.lag == 0 and kafka.committed == {0: 2 + hidden}, "no lag", 20)
    assert store.positions()["t:0"].leader_epoch == 1
    kafka.skip(3, epoch=1)
    kafka.delete_before(2 + hidden)
    with run(settings) as consumer:
        kafka.send(good(2), epoch=1)
        kafka.skip(epoch=1)
        seen(store, 3)
        wait_for(lambda: store.positions()["t:0"].next == 2 + hidden + 5, "the position is at the end", 20)
        assert consumer.status.gap_offsets == 0
    assert [kind for _, _, kind in rows(store)] == ["sample", "quarantine", "sample"]


def test_only_records_of_committed_transactions_are_asked_for(settings: Settings, kafka: FakeKafka) -> None:
    kafka.send(good(1))
    with run(settings, 1):
        assert kafka.options["isolation_level"] == "read_committed"
        assert kafka.options["auto_offset_reset"] == "none" and kafka.options["enable_auto_commit"] is False


def test_a_record_that_the_log_gives_twice_is_taken_once(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch that was under way when the position was set again, or a batch that begins before the position."""
    fetch = FakeConsumer._fetch

    def with_those_before(self: FakeConsumer) -> Any:
        found = fetch(self)
        log = self.broker.logs[0].records
        return {each: [*log[: records[0].offset], *records] for each, records in found.items()}

    monkeypatch.setattr(FakeConsumer, "_fetch", with_those_before)
    kafka.send(good(1), POISON)
    with run(settings, 2):
        kafka.send(good(2), good(3))
        seen(store, 4)
    with run(settings):
        kafka.send(good(4))
        seen(store, 5)
    assert [offset for _, offset, _ in rows(store)] == [0, 1, 2, 3, 4]
    assert kafka.names() == ["t:0:1"]


def test_corrupt_records_are_refused_in_their_place(settings: Settings, store: SampleStore, kafka: FakeKafka) -> None:
    kafka.send(good(1), good(2), good(3))
    corrupt = tolerant_fetch.Corrupt.__new__(tolerant_fetch.Corrupt)
    for name, value in {
        "offset": 1,
        "raw": b"\x00broken",
        "detail": "its checksum is wrong",
        "leader_epoch": 0,
    }.items():
        object.__setattr__(corrupt, name, value)
    kafka.logs[0].records[1] = corrupt
    with run(settings, 3):
        pass
    assert [kind for *_, kind in rows(store)] == ["sample", "quarantine", "sample"]
    [refused] = store.refusals(1)
    assert (refused["reason"], refused["detail"]) == ("corrupt", "its checksum is wrong")


def test_records_stay_in_order_though_they_are_validated_at_once(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = threading.Event()
    real = validate

    def slow(received: Received, rules: Any) -> Any:
        if received.offset == 0:
            assert later.wait(20)
        elif received.offset == 1:
            later.set()
        return real(received, rules)

    monkeypatch.setattr(validators, "validate", slow)
    monkeypatch.setattr("streams.ingest.validators.CHUNK_RECORDS", 1)
    kafka.send(*(good(n) for n in range(12)))
    with run(settings, 12):
        pass
    assert [offset for _, offset, _ in rows(store)] == list(range(12))
    assert store.offsets() == {"t:0": 12}


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_refusal_that_the_topic_does_not_take_goes_as_a_claim_check(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.max_bytes = 2000
    kafka.send(POISON, (b"x" * 3000, [("trace", b"1")]), POISON)
    with run(settings, 3):
        wait_for(lambda: len(kafka.quarantine) == 3, "3 refusals", 20)
        kafka.send(good(1), POISON)
        seen(store, 5)
    assert kafka.names() == ["t:0:0", "t:0:1", "t:0:2", "t:0:4"]
    whole, check, *_ = kafka.quarantine
    assert whole.value == b"poison" and "ratchet_claim_check" not in dict(whole.headers)
    headers = dict(check.headers)
    assert headers["ratchet_claim_check"] == b"t:0:1" and headers["ratchet_reason"] == b"not_json"
    assert "trace" not in headers and b"xxx" not in (check.value or b"")
    stored = store.refusal("t", 0, 1)
    assert stored is not None and stored["original"] == b"x" * 3000


def test_not_even_a_claim_check_fits_and_reading_goes_on(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.max_bytes = 10
    kafka.send(POISON, good(1))
    with run(settings, 2):
        wait_for(lambda: metric("quarantine_failing") == 1, "the problem is exported", 20)
        kafka.send(good(2))
        seen(store, 3)
        kafka.max_bytes = 1 << 20
        wait_for(lambda: len(kafka.quarantine) == 1, "the refusal", 20)
        wait_for(lambda: metric("quarantine_failing") == 0, "its end is exported", 20)
    assert kafka.names() == ["t:0:0"]


def test_reading_goes_on_while_the_quarantine_topic_is_away(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = FakeSender.send_all

    def away(*_: Any) -> Any:
        raise BrokerError("the quarantine topic is away.")

    monkeypatch.setattr(FakeSender, "send_all", away)
    kafka.send(POISON, good(1))
    with run(settings, 2):
        kafka.send(POISON, good(2))
        seen(store, 4)
        assert store.positions()["t:0"].published == 0 and kafka.quarantine == []
        monkeypatch.setattr(FakeSender, "send_all", send)
        wait_for(lambda: store.positions()["t:0"].published == 4, "both published", 20)
    assert kafka.names() == ["t:0:0", "t:0:2"]


def test_the_publisher_outlives_a_store_that_is_away_when_it_is_fenced(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka.send(POISON)
    with run(settings, 1) as consumer:
        wait_for(lambda: len(kafka.quarantine) == 1, "the first", 20)
        owns, asked = consumer._publisher._owns, [0]

        def away(reading: Any) -> bool:
            asked[0] += 1
            if asked[0] < 4:
                raise StoreUnavailable("away")
            return owns(reading)

        monkeypatch.setattr(consumer._publisher, "_owns", away)
        kafka.owners.update(kafka.owners)  # another has opened every sender since
        kafka.send(POISON)
        wait_for(lambda: len(kafka.quarantine) == 2, "the second", 20)
    assert kafka.names() == ["t:0:0", "t:0:1"] and asked[0] >= 4


def test_a_worker_that_slept_between_commit_and_publish_publishes_nothing_twice(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.away = True
    refused = [{**refusal(0, n), "topic": "t"} for n in range(3)]
    writer = StoreWriter(store.table)
    store.put(refused, [Position("t", 0, 3, "id-1")])
    sleeper_claim, owner_claim = (writer.claim([store.positions()["t:0"]])[0] for _ in range(2))
    sleeper, owner = (RefusalPublisher(settings.kafka, store) for _ in range(2))
    asleep, awake = Reading.of(sleeper_claim), Reading.of(owner_claim)
    sleeper.publish(asleep, refused)
    kafka.away = False
    owner.recover(awake)
    assert owner.wait_until_published(20) and sleeper.wait_until_published(20)
    assert sleeper.unpublished(asleep) is None
    assert kafka.names() == ["t:0:0", "t:0:1", "t:0:2"]
    for each in (sleeper, owner):
        each.close()


# -- what happens to the log ---------------------------------------------------------------------------------------


def test_records_that_were_deleted_unread_are_a_gap(settings: Settings, store: SampleStore, kafka: FakeKafka) -> None:
    kafka.send(*(good(n) for n in range(3)))
    with run(settings, 3):
        pass
    kafka.send(*(good(n) for n in range(3, 10)))
    kafka.delete_before(7)
    before = metric("lost_offsets_total", reason="retention") or 0
    with run(settings, 3) as consumer:
        assert consumer.status.gap_offsets == 4
    assert rows(store) == [("t", n, "sample") for n in (0, 1, 2)] + [("t", 3, "gap")] + [
        ("t", n, "sample") for n in (7, 8, 9)
    ]
    [gap] = store.gaps()
    assert (gap["offset"], gap["until"], gap["reason"]) == (3, 7, "retention")
    assert (metric("lost_offsets_total", reason="retention") or 0) - before == 4
    assert store.tally()["gap_offsets"] == 4


def test_a_log_that_was_cut_off_is_a_new_generation_from_the_divergence(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.send(*(good(n) for n in range(5)), POISON, epoch=3)
    before = metric("rewritten_offsets_total") or 0
    with run(settings, 6) as consumer:
        wait_for(lambda: store.positions()["t:0"].published == 6, "the refusal published", 20)
        with kafka.changed:
            kafka.cut_off(4)
            kafka.send(good(50), POISON, good(51), epoch=4)
        seen(store, 9)
        assert (consumer.status.gap_offsets, consumer.status.rewritten_offsets) == (0, 2), "stored before: not lost"
    assert sorted(rows(store)) == [
        *(("t", n, "sample") for n in range(5)), ("t", 5, "quarantine"),
        ("t@1", 4, "sample"), ("t@1", 5, "quarantine"), ("t@1", 6, "sample"),
    ]  # fmt: skip
    assert (store.tally()["gap_offsets"], store.tally()["rewritten_offsets"]) == (0, 2)
    assert (metric("rewritten_offsets_total") or 0) - before == 2
    assert kafka.names() == ["t:0:5", "t@1:0:5"]
    assert store.offsets() == {"t:0": 6, "t@1:0": 7}


def test_a_truncation_while_nobody_read_is_seen_by_the_leader_epoch(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.send(*(good(n) for n in range(5)), epoch=3)
    with run(settings, 5):
        pass
    assert store.positions()["t:0"].leader_epoch == 3
    kafka.cut_off(2)
    kafka.send(*(good(n) for n in range(60, 66)), epoch=4)
    with run(settings, 6):
        pass
    assert store.offsets() == {"t:0": 5, "t@1:0": 8}
    assert store.tally()["rewritten_offsets"] == 3
    with run(settings):
        kafka.send(good(70), epoch=4)
        seen(store, 12)
    assert store.offsets() == {"t:0": 5, "t@1:0": 9} and store.tally()["rewritten_offsets"] == 3


def test_where_the_divergence_is_not_known_the_log_is_read_from_its_beginning(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.send(good(1), good(2), epoch=3)
    with run(settings, 2):
        pass
    kafka.cut_off(0)
    kafka.send(good(5), good(6), good(7), epoch=9)
    with run(settings, 3):
        pass
    assert store.offsets() == {"t:0": 2, "t@1:0": 3}


def test_a_new_leader_is_not_taken_for_a_truncation(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is ahead of the store has a newer epoch than the stored position, and a seek must not mix the two."""
    failing, released = threading.Event(), threading.Event()
    commit = StoreWriter.commit

    def away(self: StoreWriter, *given: Any) -> int:
        if failing.is_set() and not released.is_set():
            raise StoreUnavailable("away")
        return commit(self, *given)

    monkeypatch.setattr(StoreWriter, "commit", away)
    kafka.send(good(1), epoch=3)
    with run(settings, 1) as consumer:
        failing.set()
        kafka.send(good(2), epoch=3)
        kafka.send(good(3), good(4), epoch=4)
        wait_for(lambda: consumer.status.waiting_for == "store", "the outage", 20)
        seeks = len(kafka.fetched_from)
        wait_for(lambda: len(kafka.fetched_from) > seeks + 2, "the partition is sought again", 20)
        released.set()
        seen(store, 4)
        kafka.send(good(5), epoch=4)
        seen(store, 5)
    assert rows(store) == [("t", n, "sample") for n in range(5)] and store.gaps() == []


def test_a_truncation_is_counted_once_though_the_store_goes_away_in_the_middle(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    kafka.send(*(good(n) for n in range(5)), epoch=3)
    claim, calls = StoreWriter.claim, [0]

    def unsteady(self: StoreWriter, starts: Any, *more: Any) -> Any:
        starts = list(starts)
        if starts[0].stream == "t@1":
            calls[0] += 1
            if calls[0] < 4:
                raise StoreUnavailable("away")
        return claim(self, starts, *more)

    monkeypatch.setattr(StoreWriter, "claim", unsteady)
    with run(settings, 5):
        with kafka.changed:
            kafka.cut_off(3)
            kafka.send(good(9), epoch=4)
        seen(store, 6)
    assert calls[0] == 4
    assert store.tally()["rewritten_offsets"] == 2 and store.offsets() == {"t:0": 5, "t@1:0": 4}


def test_a_deleted_topic_is_waited_for_and_not_made_again(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.send(good(1))
    with run(settings, 1) as consumer:
        assert kafka.created.count("t") == 1
        kafka.topic_id = None
        kafka.delete_before(0)
        wait_for(lambda: "topic t is gone" in consumer.status.problem, "the loss", 20)
        assert kafka.created.count("t") == 1
        with kafka.changed:
            kafka.topic_id = "id-2"
            kafka.logs[0].records.clear()
            kafka.send(good(2), POISON)
        seen(store, 3)
    assert store.offsets() == {"t:0": 1, "t@1:0": 2} and kafka.names() == ["t@1:0:1"]


# -- lag -----------------------------------------------------------------------------------------------------------


def test_the_lag_of_a_revoked_partition_goes_and_is_unknown_while_joining(
    settings: Settings, store: SampleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = FakeKafka("t", 2)
    install(broker, monkeypatch)
    monkeypatch.setattr("streams.ingest.membership.LogWatch.SECONDS", 0.0)
    broker.assign()
    lags: list[tuple[str, int | None]] = []
    for number in range(2):
        broker.send(good(number), partition=number)
    consumer = Consumer(settings, on_change=lambda status: lags.append((status.state, status.lag)))
    thread = threading.Thread(target=consumer.run)
    thread.start()
    try:
        wait_for(lambda: consumer.status.state == "joining", "joining", 20)
        broker.assign(0, 1)
        wait_for(lambda: metric("lag_records", partition="1") == 0, "a lag of 0", 20)
        assert metric("lag_records", partition="0") == 0
        broker.assign(0)
        wait_for(lambda: metric("lag_records", partition="1") is None, "the lag is gone", 20)
        wait_for(lambda: metric("lag_records", partition="0") == 0, "the other's is there again", 20)
        assert metric("lag_records", partition="1") is None
    finally:
        consumer.stop()
        thread.join(20)
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
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch,
    error: Exception, dependency: str, state: str, step: str,
) -> None:  # fmt: skip
    away = threading.Event()
    away.set()
    real = getattr(StoreWriter, step)

    def unsteady(self: StoreWriter, *args: Any) -> Any:
        if away.is_set():
            raise error
        return real(self, *args)

    monkeypatch.setattr(StoreWriter, step, unsteady)
    kafka.send(good(1), POISON, good(2))
    with run(settings) as consumer:
        wait_for(lambda: consumer.status.waiting_for == dependency, dependency, 20)
        assert consumer.status.state == "waiting" and str(error) in consumer.status.problem
        assert metric("waiting", **{"for": dependency}) == 1
        assert dependency_state(dependency) == state
        away.clear()
        kafka.send(good(3))
        seen(store, 4)
        wait_for(lambda: consumer.status.state == "reading", "reading again", 20)
        assert (consumer.status.waiting_for, consumer.status.problem) == ("", "")
        assert metric("waiting", **{"for": dependency}) == 0
        assert dependency_state(dependency) == "ok"
    assert [(offset, kind) for _, offset, kind in rows(store)] == list(
        enumerate(["sample", "quarantine", "sample", "sample"])
    )
    assert kafka.names() == ["t:0:1"]


def test_a_store_that_hangs_is_told_while_the_consumer_waits_for_it(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lance tries for minutes again, and the thread that reads the topic waits for it."""
    monkeypatch.setattr(ingest_report, "STORE_SECONDS", 0.2)
    hangs, answers = threading.Event(), threading.Event()
    real = SampleTable.open

    def silent(self: SampleTable, version: int | None = None) -> Any:
        if hangs.is_set():
            answers.wait(60)
        return real(self, version)

    monkeypatch.setattr(SampleTable, "open", silent)
    kafka.send(good(1))
    with run(settings, 1) as consumer:
        hangs.set()
        kafka.send(good(2))
        wait_for(lambda: metric("waiting", **{"for": "store"}) == 1, "the outage", 20)
        assert (consumer.status.waiting_for, dependency_state("store")) == ("store", "slow")
        assert "does not answer" in consumer.status.problem
        hangs.clear()
        answers.set()
        seen(store, 2)
        wait_for(lambda: consumer.status.state == "reading" and dependency_state("store") == "ok", "the end", 20)
        assert metric("waiting", **{"for": "store"}) == 0


def test_an_idle_ingest_tells_that_the_store_is_away(
    settings: Settings, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_report, "STORE_SECONDS", 0.2)
    real = SampleStore.version
    away = threading.Event()

    def unsteady(self: SampleStore) -> int:
        if away.is_set():
            raise StoreUnavailable("no route to the store.")
        return real(self)

    monkeypatch.setattr(SampleStore, "version", unsteady)
    kafka.send(good(1))
    with run(settings, 1) as consumer:
        away.set()
        wait_for(lambda: consumer.status.waiting_for == "store", "the outage", 20)
        assert (dependency_state("store"), dependency_state("broker")) == ("away", "ok")
        polls = kafka.polls
        wait_for(lambda: kafka.polls > polls + 20, "it asks the broker on and on", 20)
        assert consumer.status.state == "waiting", "what the broker answers says nothing of the store"
        away.clear()
        wait_for(lambda: consumer.status.state == "reading", "the end of the outage", 20)


@pytest.mark.parametrize("error", [StoreFull("full"), StoreUnavailable("away")])
def test_one_that_is_asked_to_stop_while_the_store_takes_nothing_tries_no_more(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch, error: StoreUnavailable
) -> None:
    """A try takes as long as Lance's own ones, and whoever stops a process kills it after a minute."""
    late: list[str] = []
    kafka.send(good(1), POISON)
    with run(settings, 2) as consumer, monkeypatch.context() as patch:

        def fails(*_: Any, **__: Any) -> None:
            if consumer._stopping.is_set():
                late.append("a try")
            raise error

        patch.setattr(StoreWriter, "_commit", fails)
        kafka.send(good(2))
        wait_for(lambda: consumer.status.state == "waiting", "it waits", 20)
        consumer.stop()
        wait_for(lambda: consumer.status.state == "stopped", "it ends", 20)
    assert late == []
    with run(settings):
        seen(store, 3)
    assert rows(store) == [("t", 0, "sample"), ("t", 1, "quarantine"), ("t", 2, "sample")]


def test_a_broker_that_is_away_is_named_and_what_was_read_is_stored(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.send(good(1), POISON)
    with run(settings, 2) as consumer:
        kafka.away = True
        wait_for(lambda: consumer.status.waiting_for == "broker", "the outage", 20)
        kafka.send(good(2), POISON)
        kafka.away = False
        seen(store, 4)
    assert [offset for _, offset, _ in rows(store)] == [0, 1, 2, 3]
    assert kafka.names() == ["t:0:1", "t:0:3"]


def test_a_registry_and_a_broker_that_are_away_at_once_do_not_end_it(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = threading.Event()
    away.set()
    real = validate

    def needs_registry(received: Received, rules: Any) -> Any:
        if received.offset == 1 and away.is_set():
            raise RegistryUnavailable("the registry is away.")
        return real(received, rules)

    monkeypatch.setattr(validators, "validate", needs_registry)
    kafka.send(good(0), good(1), good(2))
    with run(settings) as consumer:
        wait_for(lambda: consumer.status.waiting_for == "registry", "the registry's outage", 20)
        kafka.away = True
        wait_for(lambda: consumer.status.waiting_for == "broker", "the broker's outage", 20)
        kafka.away = False
        wait_for(lambda: consumer.status.waiting_for == "registry", "the registry's outage again", 20)
        away.clear()
        seen(store, 3)
    assert rows(store) == [("t", n, "sample") for n in range(3)]


def test_a_gap_waits_for_the_records_before_it(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the registry is away a record waits; what retention deletes behind it is not to be stored before it."""
    away = threading.Event()
    away.set()
    real = validate

    def needs_registry(received: Received, rules: Any) -> Any:
        if received.offset == 0 and away.is_set():
            raise RegistryUnavailable("the registry is away.")
        return real(received, rules)

    monkeypatch.setattr(validators, "validate", needs_registry)
    kafka.send(good(0), good(1))
    with run(settings) as consumer:
        wait_for(lambda: consumer.status.waiting_for == "registry", "the outage", 20)
        with kafka.changed:
            kafka.send(*(good(n) for n in range(2, 6)))
            kafka.delete_before(5)
        polls = kafka.polls
        wait_for(lambda: kafka.polls > polls + 20, "it looks again and again", 20)
        assert store.offsets() == {"t:0": 0}
        away.clear()
        seen(store, 3)
    assert rows(store) == [("t", 0, "sample"), ("t", 1, "sample"), ("t", 2, "gap"), ("t", 5, "sample")]
    assert len(store.gaps()) == 1


def test_one_that_lost_its_partition_claims_it_anew_and_stores_nothing_twice(
    settings: Settings, store: SampleStore, kafka: FakeKafka
) -> None:
    kafka.send(good(1), POISON)
    with run(settings, 2):
        wait_for(lambda: store.positions()["t:0"].published == 2, "the refusal published", 20)
        other = StoreWriter(SampleTable(settings.lake))
        for _ in range(3):
            other.claim([store.positions()["t:0"]])
            kafka.send(good(2), POISON)
            seen(store, store.tally()["sample"] + store.tally()["quarantine"] + store.tally()["duplicate"] + 2)
    assert [offset for _, offset, _ in rows(store)] == list(range(8))
    assert kafka.names() == [f"t:0:{n}" for n in (1, 3, 5, 7)]


def test_one_that_lost_its_partition_publishes_what_waited_though_no_record_comes(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = FakeSender.send_all

    def away(*_: Any) -> Any:
        raise BrokerError("the quarantine topic is away.")

    monkeypatch.setattr(FakeSender, "send_all", away)
    kafka.send(POISON)
    with run(settings, 1):
        StoreWriter(SampleTable(settings.lake)).claim([store.positions()["t:0"]])
        monkeypatch.setattr(FakeSender, "send_all", send)
        wait_for(lambda: store.positions()["t:0"].published == 1, "the refusal published", 20)
    assert kafka.names() == ["t:0:0"]


# -- records that kill ---------------------------------------------------------------------------------------------


def test_a_record_at_which_the_process_died_three_times_is_refused_and_its_neighbours_are_stored(
    settings: Settings, store: SampleStore, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that were validated at the first death each is alone from then on, so that only one can die again."""
    names = [("t", 0, number) for number in range(4)]
    die(settings.home / "ingest", "kill", *names)
    for _ in range(DEATHS - 1):
        die(settings.home / "ingest", "kill", names[2])
    inside: set[int] = set()
    together: list[set[int]] = []
    real = validate

    def watch(received: Received, rules: Any) -> Any:
        inside.add(received.offset)
        together.append(set(inside))
        result = real(received, rules)
        inside.discard(received.offset)
        return result

    monkeypatch.setattr(validators, "validate", watch)
    kafka.send(*(good(n) for n in range(8)))
    with run(settings, 8):
        pass
    assert [kind for *_, kind in rows(store)] == ["sample", "sample", "quarantine", *["sample"] * 5]
    refused = store.refusal("t", 0, 2)
    assert refused is not None and (refused["reason"], refused["original"]) == ("crashed", good(2)[0])
    assert "3 times" in refused["detail"] and kafka.names() == ["t:0:2"]
    assert not any(2 in each for each in together), "it was validated once more"
    assert [each for each in together if each & {0, 1, 3}] == [{0}, {1}, {3}]
    assert not (settings.home / "ingest" / "crashes.json").read_text().strip("{}"), "all are stored, and forgotten"
