from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest

from core.errors import StoreUnavailable
from streams.ingest import validators
from streams.ingest.membership import PartitionReader
from streams.ingest.quarantine import QuarantinePublisher
from streams.ingest.validate import Received, validate
from streams.kafka.record_batches import Corrupt
from streams.store.rows import Position
from streams.store.writer import StoreWriter
from tests.support.consumer import POISON, metric
from tests.support.fake_kafka import FakeClients, FakeKafka
from tests.support.kafka import good, wait_for
from tests.support.samples import TOPIC, refusal
from tests.unit.streams.conftest import Ingestion, Outage

# -- the plain path ------------------------------------------------------------------------------------------------


def test_each_record_has_one_row_and_each_refusal_is_published_once(ingestion: Ingestion, kafka: FakeKafka) -> None:
    kafka.send(good(1), POISON, good(1), good(2), good(4))
    kafka.logs[0].records[4] = Corrupt("t", 0, 4, -1, "its checksum is wrong", b"\x00broken", 0)
    ingestion.finish(5)
    assert ingestion.kinds() == ["sample", "quarantine", "duplicate", "sample", "quarantine"]
    refused = ingestion.store.quarantined_record("t", 0, 4)
    assert refused is not None and (refused["reason"], refused["detail"]) == ("corrupt", "its checksum is wrong")
    assert (kafka.names(), kafka.committed) == (["t:0:1", "t:0:4"], {0: 5})
    position = ingestion.position()
    assert (position.next, position.published) == (5, 5), "what was published is remembered"
    with ingestion.run():
        kafka.send(good(3))
        ingestion.wait_for(6)
    assert kafka.names() == ["t:0:1", "t:0:4"]


@pytest.mark.parametrize("hidden", [1, 1_000])
def test_offsets_without_a_record_are_neither_lag_nor_lost(ingestion: Ingestion, kafka: FakeKafka, hidden: int) -> None:
    """Transaction markers and aborted records: they are never read, and retention deletes them."""
    kafka.send(good(1), POISON)
    kafka.skip(hidden, epoch=1)
    with ingestion.run(2) as consumer:
        wait_for(lambda: ingestion.position().published == 2 + hidden, "the position is behind them", 20)
        wait_for(lambda: consumer.status.lag == 0 and kafka.committed == {0: 2 + hidden}, "no lag", 20)
    assert ingestion.position().leader_epoch == 1
    kafka.skip(3, epoch=1)
    kafka.delete_before(2 + hidden)
    with ingestion.run() as consumer:
        kafka.send(good(2), epoch=1)
        kafka.skip(epoch=1)
        ingestion.wait_for(3)
        wait_for(lambda: ingestion.position().next == 2 + hidden + 5, "the position is at the end", 20)
        assert consumer.status.gap_offsets == 0
    assert [kind for *_, kind in ingestion.rows()] == ["sample", "quarantine", "sample"]


def test_a_record_that_the_log_gives_twice_is_taken_once(ingestion: Ingestion, kafka: FakeKafka) -> None:
    """A fetch that was under way when the position was set again, or a batch that begins before the position."""
    kafka.repeats = True
    kafka.send(good(1), POISON)
    with ingestion.run(2):
        kafka.send(good(2), good(3))
        ingestion.wait_for(4)
    with ingestion.run():
        kafka.send(good(4))
        ingestion.wait_for(5)
    assert ingestion.kinds() == ["sample", "quarantine", *["sample"] * 3]
    assert kafka.names() == ["t:0:1"]


def test_records_stay_in_order_though_they_are_validated_at_once(
    ingestion: Ingestion, kafka: FakeKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = threading.Event()

    def slow(received: Received, rules: Any) -> Any:
        if received.offset == 0:
            assert later.wait(20)
        elif received.offset == 1:
            later.set()
        return validate(received, rules)

    monkeypatch.setattr(validators, "validate", slow)
    monkeypatch.setattr("streams.ingest.validators.CHUNK_RECORDS", 1)
    kafka.send(*(good(n) for n in range(12)))
    ingestion.finish(12)
    assert ingestion.kinds() == ["sample"] * 12 and ingestion.store.offsets() == {"t:0": 12}


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_refusal_that_the_topic_does_not_take_goes_as_a_claim_check(ingestion: Ingestion, kafka: FakeKafka) -> None:
    kafka.max_bytes = 2000
    kafka.send(POISON, (b"x" * 3000, [("trace", b"1")]), POISON)
    with ingestion.run(3):
        wait_for(lambda: len(kafka.quarantine) == 3, "3 refusals", 20)
        kafka.send(good(1), POISON)
        ingestion.wait_for(5)
    assert kafka.names() == ["t:0:0", "t:0:1", "t:0:2", "t:0:4"]
    whole, check, *_ = kafka.quarantine
    assert whole.value == b"poison" and "ratchet_claim_check" not in dict(whole.headers)
    headers = dict(check.headers)
    assert headers["ratchet_claim_check"] == b"t:0:1" and headers["ratchet_reason"] == b"not_json"
    assert "trace" not in headers and b"xxx" not in (check.value or b"")
    stored = ingestion.store.quarantined_record("t", 0, 1)
    assert stored is not None and stored["original"] == b"x" * 3000


def test_reading_goes_on_while_not_even_a_claim_check_fits(ingestion: Ingestion, kafka: FakeKafka) -> None:
    kafka.max_bytes = 10
    kafka.send(POISON, good(1))
    with ingestion.run(2):
        wait_for(lambda: metric("quarantine_failing") == 1, "the problem is exported", 20)
        kafka.send(good(2))
        ingestion.wait_for(3)
        kafka.max_bytes = 1 << 20
        wait_for(lambda: len(kafka.quarantine) == 1, "the refusal", 20)
        wait_for(lambda: metric("quarantine_failing") == 0, "its end is exported", 20)
    assert kafka.names() == ["t:0:0"]


def test_reading_goes_on_while_the_quarantine_topic_is_away(ingestion: Ingestion, kafka: FakeKafka) -> None:
    kafka.quarantine_away = True
    kafka.send(POISON, good(1))
    with ingestion.run(2):
        kafka.send(POISON, good(2))
        ingestion.wait_for(4)
        assert ingestion.position().published == 0 and kafka.quarantine == []
        kafka.quarantine_away = False
        wait_for(lambda: ingestion.position().published == 4, "both published", 20)
    assert kafka.names() == ["t:0:0", "t:0:2"]


def test_the_publisher_outlives_a_store_that_is_away_when_it_is_fenced(
    ingestion: Ingestion, kafka: FakeKafka, outage: Outage
) -> None:
    kafka.send(POISON)
    with ingestion.run(1) as consumer:
        wait_for(lambda: len(kafka.quarantine) == 1, "the first", 20)
        asked: list[Any] = []
        away = outage(
            consumer._publisher, "_owns", StoreUnavailable("away"), lambda *given: asked.append(given) or True
        )
        kafka.owners.update(kafka.owners)  # another has opened every sender since
        kafka.send(POISON)
        wait_for(lambda: len(asked) > 3, "further tries", 20)
        away.clear()
        wait_for(lambda: len(kafka.quarantine) == 2, "the second", 20)
    assert kafka.names() == ["t:0:0", "t:0:1"]


def test_a_worker_that_slept_between_commit_and_publish_publishes_nothing_twice(
    ingestion: Ingestion, kafka: FakeKafka
) -> None:
    kafka.away = True
    store, clients = ingestion.store, FakeClients(kafka, ingestion.settings.kafka)
    waiting = [{**refusal(0, n), "topic": "t"} for n in range(3)]
    store.put(waiting, [Position("t", 0, 3, "id-1")])
    writer = StoreWriter(store.table)
    asleep, awake = (PartitionReader.of(writer.claim([ingestion.position()])[0]) for _ in range(2))
    with (
        closing(QuarantinePublisher(clients, store)) as sleeper,
        closing(QuarantinePublisher(clients, store)) as owner,
    ):
        sleeper.publish(asleep, waiting)
        kafka.away = False
        owner.recover(awake)
        assert owner.wait_until_published(20) and sleeper.wait_until_published(20)
        assert sleeper.unpublished(asleep) is None
    assert kafka.names() == ["t:0:0", "t:0:1", "t:0:2"]


def test_a_partition_that_is_claimed_again_leaves_no_producer_behind(ingestion: Ingestion, kafka: FakeKafka) -> None:
    store = ingestion.store
    writer = StoreWriter(store.table)
    with closing(QuarantinePublisher(FakeClients(kafka, ingestion.settings.kafka), store)) as publisher:
        for offset in range(5):
            for partition in range(2):
                [claim] = writer.claim([Position(TOPIC, partition, 0)])
                publisher.publish(PartitionReader.of(claim), [refusal(partition, offset)])
            assert publisher.wait_until_published(60)
        assert len(kafka.quarantine) == 10 and len(kafka.open_senders) == 2
    assert not kafka.open_senders


# -- what happens to the log ---------------------------------------------------------------------------------------


def test_records_that_were_deleted_unread_are_a_gap(ingestion: Ingestion, kafka: FakeKafka) -> None:
    kafka.send(*(good(n) for n in range(3)))
    ingestion.finish(3)
    kafka.send(*(good(n) for n in range(3, 10)))
    kafka.delete_before(7)
    before = metric("lost_offsets_total", reason="retention") or 0
    with ingestion.run(3) as consumer:
        assert consumer.status.gap_offsets == 4
    kinds = ["sample"] * 3 + ["gap"] + ["sample"] * 3
    assert ingestion.rows() == [("t", *row) for row in zip([0, 1, 2, 3, 7, 8, 9], kinds, strict=True)]
    [gap] = ingestion.store.gaps()
    assert (gap["offset"], gap["until"], gap["reason"]) == (3, 7, "retention")
    assert (metric("lost_offsets_total", reason="retention") or 0) - before == 4
    assert ingestion.store.tally()["gap_offsets"] == 4


def test_a_log_that_was_cut_off_is_a_new_generation_from_the_divergence(
    ingestion: Ingestion, kafka: FakeKafka, outage: Outage
) -> None:
    """It is counted once, though the store is away when the new generation begins."""
    kafka.send(*(good(n) for n in range(5)), POISON, epoch=3)
    before = metric("rewritten_offsets_total") or 0
    tries: list[Any] = []

    def of(writer: StoreWriter, starts: Sequence[Position], *_: Any) -> bool:
        tries.extend(each for each in starts if each.stream == "t@1")
        return starts[0].stream == "t@1" and len(tries) < 4

    outage(StoreWriter, "claim", StoreUnavailable("away"), of)
    with ingestion.run(6) as consumer:
        wait_for(lambda: ingestion.position().published == 6, "the refusal published", 20)
        with kafka.changed:
            kafka.cut_off(4)
            kafka.send(good(50), POISON, good(51), epoch=4)
        ingestion.wait_for(9)
        assert (consumer.status.gap_offsets, consumer.status.rewritten_offsets) == (0, 2), "stored before: not lost"
    assert len(tries) == 4
    assert sorted(ingestion.rows()) == [
        *(("t", n, "sample") for n in range(5)), ("t", 5, "quarantine"),
        ("t@1", 4, "sample"), ("t@1", 5, "quarantine"), ("t@1", 6, "sample"),
    ]  # fmt: skip
    tally = ingestion.store.tally()
    assert (tally["gap_offsets"], tally["rewritten_offsets"]) == (0, 2)
    assert (metric("rewritten_offsets_total") or 0) - before == 2
    assert kafka.names() == ["t:0:5", "t@1:0:5"]
    assert ingestion.store.offsets() == {"t:0": 6, "t@1:0": 7}


@pytest.mark.parametrize(("cut", "rewritten"), [(2, 3), (0, 0)], ids=["known", "not known"])
def test_a_truncation_while_nobody_read_is_seen_by_the_leader_epoch(
    ingestion: Ingestion, kafka: FakeKafka, cut: int, rewritten: int
) -> None:
    """Where the divergence is not known, the log is read from its beginning."""
    kafka.send(*(good(n) for n in range(5)), epoch=3)
    ingestion.finish(5)
    assert ingestion.position().leader_epoch == 3
    kafka.cut_off(cut)
    kafka.send(*(good(n) for n in range(60, 66)), epoch=4)
    ingestion.finish(6)
    with ingestion.run():
        kafka.send(good(70), epoch=4)
        ingestion.wait_for(12)
    assert ingestion.store.offsets() == {"t:0": 5, "t@1:0": cut + 7}
    assert ingestion.store.tally()["rewritten_offsets"] == rewritten


def test_a_new_leader_is_not_taken_for_a_truncation(ingestion: Ingestion, kafka: FakeKafka, outage: Outage) -> None:
    """What is ahead of the store has a newer epoch than the stored position, and a seek must not mix the two."""
    away = outage(StoreWriter, "commit", StoreUnavailable("away"))
    away.clear()
    kafka.send(good(1), epoch=3)
    with ingestion.run(1) as consumer:
        away.set()
        kafka.send(good(2), epoch=3)
        kafka.send(good(3), good(4), epoch=4)
        wait_for(lambda: consumer.status.waiting_for == "store", "the outage", 20)
        seeks = len(kafka.fetched_from)
        wait_for(lambda: len(kafka.fetched_from) > seeks + 2, "the partition is sought again", 20)
        away.clear()
        ingestion.wait_for(4)
        kafka.send(good(5), epoch=4)
        ingestion.wait_for(5)
    assert ingestion.kinds() == ["sample"] * 5


def test_a_deleted_topic_is_waited_for_and_not_made_again(ingestion: Ingestion, kafka: FakeKafka) -> None:
    kafka.send(good(1))
    with ingestion.run(1) as consumer:
        assert kafka.created.count("t") == 1
        kafka.topic_id = None
        kafka.delete_before(0)
        wait_for(lambda: "topic t is gone" in consumer.status.problem, "the loss", 20)
        assert kafka.created.count("t") == 1
        with kafka.changed:
            kafka.topic_id = "id-2"
            kafka.logs[0].records.clear()
            kafka.send(good(2), POISON)
        ingestion.wait_for(3)
    assert ingestion.store.offsets() == {"t:0": 1, "t@1:0": 2} and kafka.names() == ["t@1:0:1"]
