"""An event is in the topic once, even if publishers are killed, stopped or doubled at any instant."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from core.errors import BrokerError
from core.ledger import Ledger
from core.metrics import declared
from core.settings import Settings
from streams.kafka.events import EventPublisher
from streams.kafka.outbox import read_back
from tests.support import mortal_publisher
from tests.support.broker import Broker
from tests.support.forked import ForkedProcess
from tests.support.kafka import wait_for
from tests.support.pages import ROOT, Page

pytestmark = pytest.mark.integration
EARLY = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    kafka = {"events_topic": f"events-{uuid.uuid4().hex[:8]}"}
    return broker.settings(tmp_path, kafka=kafka)


@pytest.fixture
def publisher(settings: Settings, ledger: Ledger) -> Iterator[EventPublisher]:
    with closing(patient(EventPublisher(settings, ledger))) as made:
        yield made


def patient(publisher: EventPublisher) -> EventPublisher:
    """The same settings with long timeouts, for tests that are not about a slow broker."""
    publisher._outbox.sender._seconds = 120.0
    return publisher


def record(ledger: Ledger, *numbers: int) -> None:
    for number in numbers:
        ledger.record_event("ratchet.gap.v1", f"gap-{number}", "t:0", {"from": number})


def in_topic(settings: Settings) -> list[Any]:
    return list(read_back(settings.kafka, settings.kafka.events_topic, EARLY))


def check(settings: Settings, ledger: Ledger, count: int) -> None:
    records = in_topic(settings)
    found = [json.loads(each.value)["id"] for each in records]
    assert found == [f"gap-{number}" for number in range(count)]
    places = {json.loads(each.value)["id"]: (each.partition, each.offset) for each in records}
    assert {row.event_id: (row.partition, row.offset) for row in ledger.events(1000)} == places


def start(settings: Settings, point: str, number: signal.Signals) -> ForkedProcess:
    return ForkedProcess(settings.home / "publisher.log", mortal_publisher.run, settings, point, number)


def test_a_release_becomes_a_cloud_event(settings: Settings, ledger: Ledger, publisher: EventPublisher) -> None:
    ledger.commit_release(1, clip=None, vlm=None, actor="ann", reason="first", proposal_id=None)
    before = declared.EVENTS_PUBLISHED.labels("release")._value.get()
    assert publisher.publish_pending() == 1
    assert publisher.publish_pending() == 0
    [message] = in_topic(settings)
    event = json.loads(message.value)
    assert (event["specversion"], event["id"], event["type"]) == ("1.0", "release-1", "ratchet.release.v1")
    assert (event["source"], event["subject"], event["datacontenttype"]) == (
        "urn:ratchet", "releases/1", "application/json",
    )  # fmt: skip
    assert datetime.fromisoformat(event["time"]).tzinfo is not None
    assert event["data"]["number"] == 1
    headers = dict(message.headers)
    assert headers["content-type"] == b"application/cloudevents+json"
    assert (headers["ce_id"], headers["ce_type"]) == (b"release-1", b"ratchet.release.v1")
    assert message.key == b"releases/1"
    assert declared.EVENTS_PUBLISHED.labels("release")._value.get() == before + 1
    assert declared.EVENTS_WAITING._value.get() == 0


@pytest.mark.parametrize("point", mortal_publisher.POINTS)
def test_what_a_killed_publisher_left_is_published_once(
    settings: Settings, ledger: Ledger, publisher: EventPublisher, point: str
) -> None:
    record(ledger, *range(5))
    killed = start(settings, point, signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL, killed.output()
    assert ledger.count_waiting_events() == 5
    record(ledger, 5)
    publisher.publish_pending()
    check(settings, ledger, 6)


@pytest.mark.parametrize("point", mortal_publisher.POINTS)
def test_a_publisher_that_slept_while_another_took_over_sends_nothing_twice(
    settings: Settings, ledger: Ledger, publisher: EventPublisher, point: str
) -> None:
    record(ledger, *range(5))
    process = start(settings, point, signal.SIGSTOP)
    try:
        process.wait_until_stopped()
        record(ledger, 5)
        publisher.publish_pending()
        check(settings, ledger, 6)
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0, process.output()
    finally:
        process.kill()
    record(ledger, 6)
    assert publisher.publish_pending() == 1
    check(settings, ledger, 7)


def test_two_publishers_at_once_publish_each_event_once(settings: Settings, ledger: Ledger) -> None:
    stopping = threading.Event()
    publishers = [EventPublisher(settings, ledger) for _ in range(2)]
    threads = [threading.Thread(target=each.run, args=(stopping,)) for each in publishers]
    for thread in threads:
        thread.start()
    for number in range(30):
        record(ledger, number)
    wait_for(lambda: ledger.count_waiting_events() == 0, "all events in the topic")
    stopping.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    check(settings, ledger, 30)
    row = ledger.lease("events")
    assert row is not None and row.holder == ""


def test_publishers_without_a_working_lease_fence_one_another_and_still_publish_once(
    settings: Settings, ledger: Ledger
) -> None:
    one, other = (patient(EventPublisher(settings, ledger, lease_seconds=0)) for _ in range(2))
    with closing(one), closing(other):
        for number in range(6):
            record(ledger, number)
            assert (one, other)[number % 2].publish_pending() == 1
    check(settings, ledger, 6)


def test_an_event_waits_until_the_broker_takes_it(
    settings: Settings, ledger: Ledger, publisher: EventPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(ledger, 0)
    with monkeypatch.context() as patch:
        patch.setattr("streams.kafka.outbox.FencedSender.open", _unreachable)
        with pytest.raises(BrokerError):
            publisher.publish_pending()
    assert declared.EVENTS_WAITING._value.get() == 1, "what waits while the broker is away has to be seen"
    assert publisher.publish_pending() == 1
    assert declared.EVENTS_WAITING._value.get() == 0
    check(settings, ledger, 1)


def test_the_consumer_on_the_page_reads_what_is_published(
    settings: Settings, ledger: Ledger, publisher: EventPublisher
) -> None:
    ledger.register_adapter("clip-a", "clip", "base", "space-a", "text-a", {})
    for number, (clip, share) in enumerate([("clip-a", 0.1), ("clip-a", 1.0), ("clip-a", 1.0), (None, 1.0)], 1):
        ledger.commit_release(number, clip=clip, vlm=None, actor="a", reason="r", proposal_id=None, share=share)
    publisher.publish_pending()
    [example] = [block.text for block in Page(ROOT / "docs" / "events.md").blocks if block.language == "python"]
    kafka = settings.kafka
    names = {"127.0.0.1:19092": kafka.bootstrap, "ratchet.events": kafka.events_topic, "my-index": kafka.events_topic}
    for written, actual in names.items():
        assert f'"{written}"' in example
        example = example.replace(f'"{written}"', f'"{actual}"')
    with subprocess.Popen([sys.executable, "-u", "-c", example], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            lines = [process.stdout.readline().strip() for _ in range(2)]
        finally:
            process.kill()
    assert lines == [
        "embed all again for image space space-a of release 2",
        "embed all again for image space None of release 4",
    ]


def _unreachable(_: object) -> None:
    raise BrokerError("the broker is away.")
