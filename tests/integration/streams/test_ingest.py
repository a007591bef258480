"""From any producer into the store: samples once, quarantined records with their reason, nothing lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaConsumer
from prometheus_client import REGISTRY

from core.addresses import free_port
from core.settings import Settings
from streams.ingest.consumer import Consumer
from streams.kafka.broker import EmbeddedBroker
from streams.kafka.clients import Admin
from streams.publish.folders import FolderItem, write_folder
from streams.publish.publisher import publish
from streams.store.rows import RecordPosition, position_of
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import good, make_topics, picture, produce, read_topic, reading, records_seen, taken, wait_for
from tests.support.tcp_relay import TcpRelay


class Running:
    """An ingest for several tests, because joining a group takes seconds."""

    def __init__(self, settings: Settings, ingest: Consumer) -> None:
        self.settings, self.ingest, self.store = settings, ingest, SampleStore(settings.lake)

    def take(self, count: int, send: Callable[[], Any]) -> tuple[Any, list[dict[str, Any]]]:
        """Return what ``send()`` does, and the outcomes of the ``count`` records that it produces."""
        before = places_of(self.store)
        with taken(self.ingest, count):
            sent = send()
        return sent, [row for row in self.store.records().to_pylist() if position_of(row) not in before]


def places_of(store: SampleStore) -> list[RecordPosition]:
    return [position_of(row) for row in store.records().to_pylist()]


@pytest.fixture(scope="module")
def running(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    settings = broker.settings(tmp_path_factory.mktemp("ingest"))
    make_topics(settings)
    with reading(settings) as ingest:
        yield Running(settings, ingest)


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    made = broker.settings(tmp_path, kafka={"partitions": 2})
    make_topics(made)
    return made


def exported(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"ratchet_{name}", labels) or 0.0


def test_a_published_folder_is_in_the_store_with_all_its_fields_and_in_the_metrics(
    running: Running, tmp_path: Path
) -> None:
    fields = {"label": "thing", "domain": "folder", "source": "urn:test", "time": "2026-01-02T03:04:05+00:00"}
    items = [
        FolderItem(Path(f"{n}.png"), f"folder item {n}", concept=f"c{n % 3}", tags=("a", "b"),
                   inline=picture(1000 + n), **fields)
        for n in range(40)
    ]  # fmt: skip
    write_folder(tmp_path / "data", items)
    records, size = exported("ingest_records_total"), exported("ingest_bytes_total")
    report, rows = running.take(40, lambda: publish(running.settings, tmp_path / "data"))
    assert (report.delivered, sum(report.partitions.values())) == (40, 40)
    assert Counter(row["kind"] for row in rows) == {"sample": 40}
    stored = running.store.scan(ids=[row["id"] for row in rows]).to_pylist()
    assert {row["text"]: row["image"] for row in stored} == {item.text: item.inline for item in items}
    one = stored[0]
    assert (one["domain"], one["source"], one["label"], one["tags"]) == ("folder", "urn:test", "thing", ["a", "b"])
    assert (one["time"].isoformat(), one["width"], one["height"]) == (fields["time"], 32, 32)
    assert one["ingested_at"].timestamp() == pytest.approx(time.time(), abs=60)
    assert len({row["split"] for row in stored}) == 2
    assert exported("ingest_records_total") == records + 40
    assert exported("ingest_bytes_total") >= size + sum(len(item.inline or b"") for item in items)
    wait_for(lambda: exported("store_samples", split="train") == running.store.count(split="train"), "its size")
    assert exported("store_bytes") > 0 and exported("store_fragments") > 0
    assert exported("dependency_state", dependency="broker", state="ok") == 1


def test_poison_between_good_records_is_quarantined_with_its_reason_and_bytes(running: Running) -> None:
    poison: dict[str, Any] = {
        "not_json": (b"\xff\xfe{not json", [("x-trace", b"\x00\xff")]),
        "image_undecodable": (picture(4000)[:60], [("ratchet_text", b"cut short")]),
        "image_missing": (b'{"text": "no image"}', []),
        "text_too_long": (picture(4002), [("ratchet_text", b"x" * 2001)]),
        "headers": (picture(4004), [("ratchet_text", b"\xff\xff")]),
        "empty": (b"", []),
    }
    kafka, counted = running.settings.kafka, "ingest_quarantined_total"
    before = {reason: exported(counted, reason=reason) for reason in poison}
    messages = [each for n, bad in enumerate(poison.values()) for each in (good(4100 + n), bad)]
    places, rows = running.take(len(messages), lambda: produce(kafka, messages, partition=1))
    assert [row["reason"] for row in rows[1::2]] == list(poison)
    assert [row["kind"] for row in rows[::2]] == ["sample"] * len(poison)
    assert all(exported(counted, reason=reason) == seen + 1 for reason, seen in before.items())
    published = read_topic(kafka, kafka.quarantine_topic, len(poison))
    by_place = {int(dict(each.headers)["ratchet_offset"]): each for each in published}
    for (reason, (value, headers)), place in zip(poison.items(), places[1::2], strict=True):
        message = by_place[place[2]]
        got = dict(message.headers)
        assert message.value == value
        assert (got["ratchet_reason"].decode(), got["ratchet_topic"].decode()) == (reason, place[0])
        assert got["ratchet_detail"]
        assert all(got[name] == each for name, each in headers if not name.startswith("ratchet_"))


def test_a_topic_that_was_deleted_and_made_anew_is_read_as_a_new_generation(broker: Broker, tmp_path: Path) -> None:
    settings = broker.settings(tmp_path, kafka={"partitions": 1})
    make_topics(settings)
    produce(settings.kafka, [good(n) for n in range(5)])
    topic = settings.kafka.topic
    admin = Admin(settings.kafka)
    with reading(settings) as ingest:
        wait_for(lambda: ingest.status.samples == 5, "5 samples")
        admin.ask("deleting", lambda client: client.delete_topics([topic]))
        wait_for(lambda: f"topic {topic} is gone" in ingest.status.problem, "the loss was told")
        assert admin.topic_id(topic) is None, "a topic that was read is not made again with defaults"
        make_topics(settings)
        produce(settings.kafka, [good(n) for n in range(3, 8)])
        wait_for(lambda: records_seen(ingest.status) == 10, "5 more records")
    admin.close()
    store = SampleStore(settings.lake)
    assert store.offsets() == {f"{topic}:0": 5, f"{topic}@1:0": 5}
    assert store.records()["kind"].to_pylist() == ["sample"] * 5 + ["duplicate"] * 2 + ["sample"] * 3


def test_a_broker_that_goes_away_is_waited_for_and_one_that_lost_its_log_is_noticed(tmp_path: Path) -> None:
    port = free_port()
    with EmbeddedBroker(advertised=f"127.0.0.1:{port}") as embedded, TcpRelay(port, embedded.address) as proxy:
        settings = Broker(f"127.0.0.1:{port}", embedded=True).settings(tmp_path, kafka={"partitions": 1})
        topic = settings.kafka.topic
        make_topics(settings)
        places = produce(settings.kafka, [good(n) for n in range(4)])
        with reading(settings) as ingest:
            wait_for(lambda: ingest.status.samples == 4, "4 samples")
            proxy.cut()
            wait_for(lambda: ingest.status.state == "waiting", "the loss was noticed")
            assert "cannot be reached" in ingest.status.problem
            proxy.open()
            places += produce(settings.kafka, [good(4), (b"poison", []), good(5)])
            wait_for(lambda: records_seen(ingest.status) == 7, "3 more records")
            wait_for(lambda: ingest.status.state == "reading", "reading again")
            assert ingest.status.problem == ""
            assert places_of(SampleStore(settings.lake)) == sorted(places)
            assert len(read_topic(settings.kafka, settings.kafka.quarantine_topic, 1)) == 1

            embedded.kill()
            embedded.start()
            wait_for(lambda: "is gone" in ingest.status.problem, "the operator is asked to make the topic again")
            make_topics(settings)  # ingest itself must not have done it, with the broker's number of partitions
            produce(settings.kafka, [good(100 + n) for n in range(9)])
            wait_for(lambda: ingest.status.samples == 15, "9 samples of the new log")
        assert SampleStore(settings.lake).offsets() == {f"{topic}:0": 7, f"{topic}@1:0": 9}


def test_one_that_is_stopped_while_it_joins_the_group_leaves_it_to_the_next(settings: Settings) -> None:
    places = produce(settings.kafka, [good(n) for n in range(4)])
    with reading(settings) as first:
        wait_for(lambda: first._connected, "the first begins to join")
    with reading(settings) as second:
        wait_for(lambda: first.status.samples + second.status.samples == 4, "4 samples")
    assert places_of(SampleStore(settings.lake)) == sorted(places)


def test_a_group_that_lets_nobody_in_is_joined_again_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streams.ingest.ingest_report.GROUP_PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr("streams.ingest.membership.JOIN_SECONDS", 1.0)
    with EmbeddedBroker() as embedded:
        settings = Broker(embedded.address, embedded=True).settings(tmp_path)
        make_topics(settings)
        other = KafkaConsumer(settings.kafka.topic, bootstrap_servers=embedded.address, group_id=settings.kafka.group)
        while not other.group_metadata().member_id:  # with the id that the broker gives it, it asks to join
            other.poll(timeout_ms=50)
        other.poll(timeout_ms=1000)
        other.close(timeout_ms=1000)  # while it joins: the embedded broker's group waits for it for ever
        with reading(settings) as ingest:
            for _ in range(2):
                wait_for(lambda: ingest.status.state == "waiting", "the problem is told")
                assert settings.kafka.group in ingest.status.problem
                wait_for(lambda: ingest.status.state == "joining", "the group is joined again")


def test_two_processes_share_the_partitions_and_one_takes_over(settings: Settings) -> None:
    with reading(settings) as first:
        wait_for(lambda: first.status.state == "reading", "the first reads")
        places = produce(settings.kafka, [good(n) for n in range(20)])
        with reading(settings) as second:
            wait_for(lambda: first.status.samples + second.status.samples == 20, "20 samples")
            more = 20
            while second.status.samples == 0:  # until the group has given it a partition
                places += produce(settings.kafka, [good(more), good(more + 1)])
                more += 2
                assert more < 400, "the second never got a partition"
                time.sleep(0.2)
        places += produce(settings.kafka, [good(n) for n in range(more, more + 10)])
        store = SampleStore(settings.lake)
        wait_for(lambda: store.count() == more + 10, "the first took over")
    assert places_of(store) == sorted(places)
    assert set(store.records()["kind"].to_pylist()) == {"sample"}
