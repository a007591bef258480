"""Only the newest sender of a transactional ID can send, even if the older one is in a transaction."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from typing import Any

import pytest
from kafka import KafkaProducer
from kafka.errors import MessageSizeTooLargeError

from core.errors import BrokerError, Fenced, RecordTooLarge
from core.settings.streams import Kafka
from ratchet_client.encoding import Encoded
from streams.kafka.clients import ensure_topics
from streams.kafka.outbox import FencedSender, Outbox, OutboxEntry, read_back
from tests.support.broker import Broker


class Place:
    """A new topic, and senders of one transactional ID."""

    def __init__(self, broker: Broker, stack: ExitStack) -> None:
        self.kafka, self.topic, self._stack = Kafka(bootstrap=broker.address), f"fenced-{uuid.uuid4().hex[:8]}", stack
        ensure_topics(self.kafka, [self.topic])

    def sender(self, *, opened: bool = False, **options: Any) -> FencedSender:
        sender = FencedSender(self.kafka, f"id-{self.topic}", **options)
        if opened:
            sender.open()
        return self._stack.enter_context(closing(sender))

    def send(self, sender: FencedSender, *texts: str) -> list[int]:
        return [place.offset for place in sender.send_all(self.topic, records(*texts))]

    def found(self) -> dict[int, str]:
        early = datetime(2026, 1, 1, tzinfo=UTC)
        return {each.offset: each.value.decode() for each in read_back(self.kafka, self.topic, early)}

    def values(self) -> list[str]:
        return list(self.found().values())


@pytest.fixture
def place(broker: Broker) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(broker, stack)


def records(*texts: str) -> list[Encoded]:
    return [Encoded(b"key", text.encode(), [("id", text.encode())]) for text in texts]


def test_records_are_sent_in_order_and_each_offset_is_where_its_record_is(place: Place) -> None:
    sender = place.sender(opened=True)
    texts = [f"record {number}" for number in range(50)]
    offsets = place.send(sender, *texts[:30]) + place.send(sender, *texts[30:])
    found = place.found()
    assert [found[offset] for offset in offsets] == texts == list(found.values())


def test_a_sender_with_a_newer_one_or_without_its_lease_sends_nothing(place: Place) -> None:
    old = place.sender(opened=True)
    place.send(old, "a")
    new = place.sender(opened=True)
    with pytest.raises(Fenced, match="newer"):
        place.send(old, "too late")
    assert not old.opened
    place.send(new, "b")
    without_lease = place.sender(opened=True, still_owner=lambda: False)
    with pytest.raises(Fenced, match="lease"):
        place.send(without_lease, "c")
    assert place.values() == ["a", "b"]


def test_a_sender_that_is_fenced_between_two_records_of_a_transaction_adds_nothing_more(
    place: Place, broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = place.sender(opened=True, seconds=15), place.sender()
    send = KafkaProducer.send

    def slow(producer: KafkaProducer, *args: Any, **kwargs: Any) -> Any:
        future = send(producer, *args, **kwargs)
        if args[1] == b"first":
            future.get(10)
            new.open()
        return future

    monkeypatch.setattr(KafkaProducer, "send", slow)
    with pytest.raises(Fenced):
        place.send(old, "first", "second")
    place.send(new, "third")
    # Tansu shows the record of the aborted transaction; Apache Kafka does not.
    assert place.values() == (["first", "third"] if broker.embedded else ["third"])


def test_a_commit_that_is_never_answered_ends_in_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = place.sender(opened=True, seconds=5), place.sender()
    commit = KafkaProducer.commit_transaction

    def late(producer: KafkaProducer) -> None:
        new.open()
        monkeypatch.setattr(KafkaProducer, "commit_transaction", commit)
        commit(producer)

    monkeypatch.setattr(KafkaProducer, "commit_transaction", late)
    with pytest.raises(BrokerError):
        place.send(old, "never committed")
    assert not old.opened


def test_a_record_that_is_too_large_is_named_and_the_sender_can_be_opened_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = KafkaProducer.send

    def limited(producer: KafkaProducer, *args: Any, **kwargs: Any) -> Any:
        if len(args[1]) > 100:
            raise MessageSizeTooLargeError("larger than 100 bytes")
        return send(producer, *args, **kwargs)

    monkeypatch.setattr(KafkaProducer, "send", limited)
    sender = place.sender(opened=True)
    with pytest.raises(RecordTooLarge) as caught:
        place.send(sender, "x" * 101, "a")
    assert caught.value.index == 0
    sender.open()
    place.send(sender, "a")
    assert place.values() == ["a"]


def test_an_outbox_does_not_send_what_an_earlier_sender_sent(place: Place) -> None:
    old, new = (
        Outbox(place.topic, place.sender(), lambda record: dict(record.headers)["id"].decode()) for _ in range(2)
    )
    now = datetime.now(UTC)
    entries = [OutboxEntry(text, record, now) for text, record in zip("abc", records(*"abc"), strict=True)]
    first = old.publish(entries[:2])
    assert new.publish(entries) == {**first, "c": new.publish(entries[2:])["c"]}
    with pytest.raises(Fenced):
        old.publish(entries)
    assert place.values() == ["a", "b", "c"]
