from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest
from kafka.errors import KafkaTimeoutError

from core.addresses import free_port
from core.settings.streams import Kafka
from ratchet_client import AsyncProducer, BrokerError, ConfigError, Delivery, Producer, RecordError
from ratchet_client.broker import Connection
from ratchet_client.records import TOPIC
from streams.kafka.broker import EmbeddedBroker
from streams.records.codecs import decode
from tests.support.kafka import picture, read_topic


def test_what_either_producer_sends_is_in_the_topic_with_its_delivery() -> None:
    async def send(address: str) -> list[Delivery]:
        async with AsyncProducer(address) as producer:
            (await producer.send(image=picture(9), text="t")).cancel()  # nobody waits for it any more
            sent = [await producer.send(image=picture(number), text=f"{number}") for number in (2, 3)]
            with pytest.raises(RecordError) as caught:
                await producer.send(image=b"no image", text="x")
            assert caught.value.reason == "image_format"
            return [await each for each in sent]

    with EmbeddedBroker() as broker:
        broker.ensure_topics([TOPIC])
        with Producer(broker.address) as producer:
            deliveries = [producer.send(image=picture(number), text=f"{number}").result(60) for number in range(2)]
        deliveries += asyncio.run(send(broker.address))
        records = {each.offset: each for each in read_topic(Kafka(bootstrap=broker.address), TOPIC)}
    for number, delivery in enumerate(deliveries):
        sample = decode(records[delivery.offset].value, records[delivery.offset].headers)
        assert (sample.text, sample.id, delivery.topic) == (str(number), delivery.sample_id, TOPIC)


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


@pytest.fixture
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratchet_client.producer.KafkaProducer", Deaf)


@pytest.mark.usefixtures("deaf")
def test_leaving_the_block_raises_what_was_not_delivered_unless_each_record_is_told() -> None:
    with pytest.raises(BrokerError, match="no acknowledgement"), Producer("nowhere:1") as producer:
        producer.send(image=picture(1), text="t")

    async def send() -> None:
        async with AsyncProducer("nowhere:1") as producer:
            await producer.send(image=picture(1), text="t")

    with pytest.raises(BrokerError, match="no acknowledgement"):
        asyncio.run(send())
    told: list[Any] = []
    with Producer("nowhere:1", on_delivery=told.append) as producer:
        future: Future[Delivery] = producer.send(image=picture(1), text="t")
    assert [type(each) for each in told] == [BrokerError] and future.exception() is told[0]


def test_an_option_that_is_wrong_and_a_broker_that_is_away_are_named_and_no_password() -> None:
    with pytest.raises(ConfigError, match="sasl_pasword"):
        Producer("127.0.0.1:1", options={"sasl_pasword": "x"})
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(BrokerError, match=address) as caught:
        Producer(address, connect_seconds=0.5)
    assert caught.value.fix
    assert "hush" not in repr(Connection("a:1", {"sasl_plain_password": "hush"}))
