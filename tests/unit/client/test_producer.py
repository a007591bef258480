from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest
from kafka.errors import KafkaTimeoutError

from core.addresses import free_port
from core.settings.streams import Kafka
from ratchet_client import AsyncProducer, BrokerError, ConfigError, Delivery, Limits, Producer, RecordError
from ratchet_client.broker import Connection
from ratchet_client.records import TOPIC
from streams.kafka.broker import EmbeddedBroker
from streams.records.codecs import decode
from tests.support.kafka import picture, read_topic


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as started:
        started.ensure_topics([TOPIC])
        yield started


def test_what_either_producer_sends_is_in_the_topic_with_its_delivery(broker: EmbeddedBroker) -> None:
    with Producer(broker.address) as producer:
        deliveries = [producer.send(image=picture(number), text=f"{number}").result(60) for number in range(2)]

    async def send() -> list[Delivery]:
        async with AsyncProducer(broker.address) as producer:
            sent = [await producer.send(image=picture(number), text=f"{number}") for number in (2, 3)]
            with pytest.raises(RecordError) as caught:
                await producer.send(image=b"no image", text="x")
            assert caught.value.reason == "image_format"
            return [await each for each in sent]

    deliveries += asyncio.run(send())
    records = {each.offset: each for each in read_topic(Kafka(bootstrap=broker.address), TOPIC)}
    for number, delivery in enumerate(deliveries):
        sample = decode(records[delivery.offset].value, records[delivery.offset].headers)
        assert (sample.text, sample.id) == (str(number), delivery.sample_id)


def test_a_delivery_that_nobody_waits_for_any_more_does_no_harm(broker: EmbeddedBroker) -> None:
    async def send() -> None:
        async with AsyncProducer(broker.address) as producer:
            (await producer.send(image=picture(1), text="t")).cancel()
            assert (await (await producer.send(image=picture(2), text="t"))).topic == TOPIC

    asyncio.run(send())


class Deaf:
    """A kafka-python producer whose broker never acknowledges."""

    DEFAULT_CONFIG: ClassVar[dict[str, Any]] = {}

    def __init__(self, **options: Any) -> None:
        self.failed: list[Any] = []

    def send(self, *args: Any, **options: Any) -> Any:
        raise KafkaTimeoutError("no acknowledgement")

    def flush(self, timeout: float) -> None:
        pass

    def close(self, timeout: float) -> None:
        pass


def test_leaving_the_block_raises_what_was_not_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratchet_client.producer.KafkaProducer", Deaf)
    with pytest.raises(BrokerError, match="no acknowledgement"), Producer("nowhere:1") as producer:
        producer.send(image=picture(1), text="t")

    async def send() -> None:
        async with AsyncProducer("nowhere:1") as producer:
            await producer.send(image=picture(1), text="t")

    with pytest.raises(BrokerError, match="no acknowledgement"):
        asyncio.run(send())


def test_with_on_delivery_each_record_is_told_and_nothing_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratchet_client.producer.KafkaProducer", Deaf)
    told: list[Any] = []
    with Producer("nowhere:1", on_delivery=told.append) as producer:
        future: Future[Delivery] = producer.send(image=picture(1), text="t")
    assert [type(each) for each in told] == [BrokerError] and future.exception() is told[0]


def test_limits_are_those_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratchet_client.producer.KafkaProducer", Deaf)
    producer = Producer("nowhere:1", limits=Limits(max_text_chars=3, min_side=64))
    for fields, reason in (({"text": "long"}, "text_too_long"), ({"text": "abc"}, "image_too_small")):
        with pytest.raises(RecordError) as caught:
            producer.send(image=picture(1, size=32), **fields)
        assert caught.value.reason == reason


def test_an_option_that_is_wrong_and_a_broker_that_is_away_are_named() -> None:
    with pytest.raises(ConfigError, match="sasl_pasword"):
        Producer("127.0.0.1:1", options={"sasl_pasword": "x"})
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(BrokerError, match=address) as caught:
        Producer(address, connect_seconds=0.5)
    assert caught.value.fix


def test_a_connection_does_not_show_its_password() -> None:
    assert "hush" not in repr(Connection("a:1", {"sasl_plain_password": "hush"}))
