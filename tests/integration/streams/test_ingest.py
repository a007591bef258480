"""From any producer into the store: samples once, quarantined records with their reason, nothing lost."""

from __future__ import annotations

import base64
import json
import time
from collections import Counter
from collections.abc import Iterator
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
from tests.support.kafka import (
    Message,
    good,
    make_topics,
    picture,
    produce,
    quarantined_places,
    read_topic,
    reading,
    records_seen,
    wait_for,
)
from tests.support.tcp_relay import TcpRelay

pytestmark = pytest.mark.integration


class Running:
    """An ingest for all tests of this module, because joining a group takes seconds."""

    def __init__(self, settings: Settings, ingest: Consumer) -> None:
        self.settings = settings
        self.ingest = ingest
        self.store = SampleStore(settings.lake)

    def take(self, count: int, send: Any) -> list[dict[str, Any]]:
        """Return the outcomes of the ``count`` records that ``send()`` produces."""
        before, seen = places_of(self.store), records_seen(self.ingest.status)
        send()
        wait_for(lambda: records_seen(self.ingest.status) >= seen + count, f"{count} records")
        return [row for row in self.store.records().to_pylist() if position_of(row) not in before]


def places_of(store: SampleStore) -> list[RecordPosition]:
    return [position_of(row) for row in store.records().to_pylist()]


@pytest.fixture(scope="module")
def running(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    home = tmp_path_factory.mktemp("ingest")
    settings = broker.settings(home, ingest={"allowed_uris": [f"file://{home}/allowed"]})
    make_topics(settings)
    with reading(settings) as ingest:
        yield Running(settings, ingest)


def exported(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"ratchet_{name}", labels) or 0.0


def refusals() -> Counter[str]:
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    name = "ratchet_ingest_quarantined_total"
    return Counter({each.labels["reason"]: int(each.value) for each in samples if each.name == name})


def test_records_bytes_refusals_and_the_store_are_in_the_metrics(running: Running) -> None:
    records, size = exported("ingest_records_total"), exported("ingest_bytes_total")
    refused = refusals()
    messages: list[Message] = [*(good(n) for n in range(7000, 7005)), (b"no picture", good(0)[1])]
    rows = running.take(6, lambda: produce(running.settings.kafka, messages))
    assert Counter(row["kind"] for row in rows) == {"sample": 5, "quarantine": 1}
    assert exported("ingest_records_total") == records + 6
    assert exported("ingest_bytes_total") >= size + sum(len(value or b"") for value, _ in messages)
    assert refusals() - refused == Counter(row["reason"] for row in rows if row["kind"] == "quarantine")
    wait_for(lambda: exported("store_samples", split="train") == running.store.count(split="train"), "its size")
    assert exported("store_bytes") > 0 and exported("store_fragments") > 0
    assert exported("dependency_state", dependency="broker", state="ok") == 1


def test_a_published_folder_is_in_the_store_with_all_its_fields(running: Running, tmp_path: Path) -> None:
    items = [
        FolderItem(
            path=Path(f"{n}.png"),
            text=f"folder item {n}",
            label="thing",
            concept=f"c{n % 3}",
            domain="folder",
            source="urn:test",
            time="2026-01-02T03:04:05+00:00",
            tags=("a", "b"),
            inline=picture(1000 + n),
        )
        for n in range(40)
    ]
    write_folder(tmp_path / "data", items)
    reports: list[Any] = []
    rows = running.take(40, lambda: reports.append(publish(running.settings, tmp_path / "data")))
    assert (reports[0].delivered, sum(reports[0].partitions.values())) == (40, 40)
    assert Counter(row["kind"] for row in rows) == {"sample": 40}
    stored = running.store.scan(ids=[row["id"] for row in rows]).to_pylist()
    assert {row["text"]: row["image"] for row in stored} == {item.text: item.inline for item in items}
    one = stored[0]
    assert (one["domain"], one["source"], one["label"], one["tags"]) == ("folder", "urn:test", "thing", ["a", "b"])
    assert (one["time"].isoformat(), one["width"], one["height"]) == ("2026-01-02T03:04:05+00:00", 32, 32)
    assert one["ingested_at"].timestamp() == pytest.approx(time.time(), abs=60)
    assert len({row["split"] for row in stored}) == 2


def test_poison_between_good_records_is_quarantined_with_its_reason_and_bytes(running: Running) -> None:
    poison: dict[str, Message] = {
        "not_json": (b"\xff\xfe{not json", [("x-trace", b"\x00\xff")]),
        "image_undecodable": (picture(4000)[:60], [("ratchet_text", b"cut short")]),
        "image_missing": (b'{"text": "no image"}', []),
        "text_missing": (picture(4001), []),
        "text_too_long": (picture(4002), [("ratchet_text", b"x" * 2001)]),
        "schema": (json.dumps({"image": "aGk=", "text": 1}).encode(), []),
        "image_format": (json.dumps({"image": base64.b64encode(b"<svg/>").decode(), "text": "t"}).encode(), []),
        "image_too_small": (picture(4003, size=4), [("ratchet_text", b"tiny")]),
        "headers": (picture(4004), [("ratchet_text", b"\xff\xff")]),
        "empty": (b"", []),
    }
    messages = [each for n, bad in enumerate(poison.values()) for each in (good(4100 + n), bad)]
    places: list[Any] = []
    rows = running.take(len(messages), lambda: places.extend(produce(running.settings.kafka, messages, partition=1)))
    assert [row["reason"] for row in rows[1::2]] == list(poison)
    assert [row["kind"] for row in rows[::2]] == ["sample"] * len(poison)
    published = read_topic(running.settings.kafka, running.settings.kafka.quarantine_topic, len(poison))
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


def test_a_broker_that_goes_away_and_comes_back_is_waited_for(tmp_path: Path) -> None:
    port = free_port()
    with EmbeddedBroker(advertised=f"127.0.0.1:{port}") as embedded:
        proxy = TcpRelay(port, embedded.address)
        proxy.open()
        settings = Broker(f"127.0.0.1:{port}", embedded=True).settings(tmp_path)
        direct = settings.kafka
        make_topics(settings)
        places = produce(direct, [good(n) for n in range(4)])
        with reading(settings) as ingest:
            wait_for(lambda: ingest.status.samples == 4, "4 samples")
            proxy.cut()
            wait_for(lambda: ingest.status.state == "waiting", "the loss was noticed")
            assert "cannot be reached" in ingest.status.problem
            proxy.open()
            places += produce(direct, [good(4), (b"poison", []), good(5)])
            wait_for(lambda: records_seen(ingest.status) == 7, "3 more records")
            wait_for(lambda: ingest.status.state == "reading", "reading again")
        assert ingest.status.problem == ""
        assert places_of(SampleStore(settings.lake)) == sorted(places)
        assert quarantined_places(settings.kafka, 1) == [places[5]]
        proxy.cut()


def test_an_embedded_broker_that_lost_its_log_is_noticed(tmp_path: Path) -> None:
    with EmbeddedBroker() as embedded:
        settings = Broker(embedded.address, embedded=True).settings(tmp_path, kafka={"partitions": 1})
        make_topics(settings)
        produce(settings.kafka, [good(n) for n in range(6)])
        with reading(settings) as ingest:
            wait_for(lambda: ingest.status.samples == 6, "6 samples")
            embedded.kill()
            embedded.start()
            wait_for(lambda: "is gone" in ingest.status.problem, "the operator is asked to make the topic again")
            make_topics(settings)  # ingest itself must not have done it, with the broker's number of partitions
            produce(settings.kafka, [good(100 + n) for n in range(9)])
            wait_for(lambda: ingest.status.samples == 15, "9 samples of the new log")
        topic = settings.kafka.topic
        assert SampleStore(settings.lake).offsets() == {f"{topic}:0": 6, f"{topic}@1:0": 9}


def test_one_that_is_stopped_while_it_joins_the_group_leaves_it_to_the_next(broker: Broker, tmp_path: Path) -> None:
    settings = broker.settings(tmp_path)
    make_topics(settings)
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


def test_two_processes_share_the_partitions_and_one_takes_over(broker: Broker, tmp_path: Path) -> None:
    settings = broker.settings(tmp_path)
    make_topics(settings)
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
