"""An event is in the topic once, even if publishers are killed, stopped or doubled at any instant."""

from __future__ import annotations

import json
import signal
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
from tests.support.broker import Broker
from tests.support.forked import ForkedProcess
from tests.support.kafka import wait_for
from tests.support.mortal_streams import PUBLISHING, publish


@pytest.fixture
def settings(broker: Broker, tmp_path: Path) -> Settings:
    return broker.settings(tmp_path, kafka={"events_topic": f"events-{uuid.uuid4().hex[:8]}"})


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
    return list(read_back(settings.kafka, settings.kafka.events_topic, datetime(2026, 1, 1, tzinfo=UTC)))


def check(settings: Settings, ledger: Ledger, count: int) -> None:
    records = in_topic(settings)
    found = [json.loads(each.value)["id"] for each in records]
    assert found == [f"gap-{number}" for number in range(count)]
    places = {json.loads(each.value)["id"]: (each.partition, each.offset) for each in records}
    assert {row.event_id: (row.partition, row.offset) for row in ledger.events(1000)} == places


def test_a_release_becomes_a_cloud_event_as_soon_as_the_broker_takes_it(
    settings: Settings, ledger: Ledger, publisher: EventPublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(_: object) -> None:
        raise BrokerError("the broker is away.")

    ledger.commit_release(1, clip=None, vlm=None, actor="ann", reason="first", proposal_id=None)
    published, waiting = declared.EVENTS_PUBLISHED.labels("release")._value, declared.EVENTS_WAITING._value
    before = published.get()
    with monkeypatch.context() as patch, pytest.raises(BrokerError):
        patch.setattr("streams.kafka.outbox.FencedSender.open", unreachable)
        publisher.publish_pending()
    assert waiting.get() == 1, "what waits while the broker is away has to be seen"
    assert [publisher.publish_pending() for _ in range(2)] == [1, 0]
    assert (published.get(), waiting.get()) == (before + 1, 0)
    [message] = in_topic(settings)
    event, headers = json.loads(message.value), dict(message.headers)
    assert datetime.fromisoformat(event.pop("time")).tzinfo is not None
    assert event.pop("data")["number"] == 1
    assert event == {
        "specversion": "1.0", "id": "release-1", "type": "ratchet.release.v1", "source": "urn:ratchet",
        "subject": "releases/1", "sequence": "000000000001", "datacontenttype": "application/json",
    }  # fmt: skip
    assert headers["content-type"] == b"application/cloudevents+json"
    assert (headers["ce_id"], headers["ce_type"]) == (b"release-1", b"ratchet.release.v1")
    assert message.key == b"releases/1"


@pytest.mark.parametrize(
    ("point", "number"),
    [("sent_but_not_committed", signal.SIGKILL), *((point, signal.SIGSTOP) for point in PUBLISHING)],
)
def test_what_a_publisher_left_that_was_killed_or_slept_while_another_took_over_is_published_once(
    settings: Settings, ledger: Ledger, publisher: EventPublisher, point: str, number: signal.Signals
) -> None:
    record(ledger, *range(5))
    process = ForkedProcess(settings.home / "publisher.log", publish, settings, point, number)
    try:
        if number == signal.SIGKILL:
            assert process.wait(60) == -signal.SIGKILL, process.output()
        else:
            process.wait_until_stopped()
        assert ledger.count_waiting_events() == 5
        record(ledger, 5)
        publisher.publish_pending()
        check(settings, ledger, 6)
        if number == signal.SIGSTOP:
            process.send_signal(signal.SIGCONT)
            assert process.wait(60) == 0, process.output()
            record(ledger, 6)
            assert publisher.publish_pending() == 1
            check(settings, ledger, 7)
    finally:
        process.kill()


def test_two_publishers_at_once_publish_each_event_once(settings: Settings, ledger: Ledger) -> None:
    stopping = threading.Event()
    publishers = [EventPublisher(settings, ledger) for _ in range(2)]
    threads = [threading.Thread(target=each.run, args=(stopping,)) for each in publishers]
    for thread in threads:
        thread.start()
    record(ledger, *range(30))
    wait_for(lambda: ledger.count_waiting_events() == 0, "all events in the topic")
    stopping.set()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    check(settings, ledger, 30)
    row = ledger.lease("events")
    assert row is not None and row.holder == ""
