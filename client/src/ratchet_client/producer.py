"""Sending samples: checked before they leave, acknowledged by all replicas, each with its own delivery report."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from kafka import KafkaProducer
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError, RecordListTooLargeError

from ratchet_client.broker import CONNECT_SECONDS, MAX_RECORD_BYTES, Connection, client_options, explain
from ratchet_client.encoding import Encoded, Encoding, Headers, encode
from ratchet_client.errors import BrokerError
from ratchet_client.images import decode_image
from ratchet_client.records import DEFAULT_LIMITS, TOPIC, Limits, Sample, check_text, make_sample

log = logging.getLogger(__name__)
DELIVERY_SECONDS = 60.0
#: Bytes of one request to the broker. Small: the embedded broker counts a batch as one record of its log.
BATCH_BYTES = 64 * 1024
#: Records that may wait for their acknowledgement: at 64 KiB each some 32 MiB.
MAX_IN_FLIGHT = 512


@dataclass(frozen=True, slots=True)
class Delivery:
    """Position of a record in its topic."""

    topic: str
    partition: int
    offset: int
    sample_id: str = ""


Report = Callable[[Delivery | BrokerError], None]


class RecordSender:
    """Sends encoded records to any topic, with an acknowledgement for each. Thread safe.

    The connection is made at once; BrokerError after ``connect_seconds`` without one.
    """

    def __init__(
        self,
        connection: Connection,
        connect_seconds: float = CONNECT_SECONDS,
        delivery_seconds: float = DELIVERY_SECONDS,
    ) -> None:
        self.connection = connection
        self._room = threading.BoundedSemaphore(MAX_IN_FLIGHT)
        bounds = {
            "bootstrap_timeout_ms": int(connect_seconds * 1000),
            "delivery_timeout_ms": int(delivery_seconds * 1000),
            "request_timeout_ms": int(min(delivery_seconds, 30) * 1000),
            "max_block_ms": int(delivery_seconds * 1000),
            "reconnect_backoff_max_ms": 1000,
            "max_request_size": MAX_RECORD_BYTES,
            "batch_size": BATCH_BYTES,
            "acks": "all",
            "enable_idempotence": True,
        }
        try:
            self._client = KafkaProducer(**{**bounds, **client_options(connection, KafkaProducer.DEFAULT_CONFIG)})
        except (KafkaError, OSError) as error:
            raise explain(error, connection, "connecting a producer") from error

    def send(self, topic: str, record: Encoded, note: str = "") -> Future[Delivery]:
        """Queue one record; the future holds its delivery, or a BrokerError. Waits while too many are in flight."""
        result: Future[Delivery] = Future()
        result.set_running_or_notify_cancel()  # what is queued is sent: it cannot be cancelled
        self._room.acquire()

        def delivered(metadata: Any) -> None:
            self._room.release()
            result.set_result(Delivery(metadata.topic, metadata.partition, metadata.offset, note))

        def failed(error: BaseException) -> None:
            self._room.release()
            result.set_exception(self._explain(error, topic, len(record.value or b"")))

        try:
            headers: Headers = list(record.headers)
            queued = self._client.send(topic, record.value, key=record.key, headers=headers)
        except (KafkaError, OSError) as error:
            failed(error)
            return result
        queued.add_callback(delivered)
        queued.add_errback(failed)
        return result

    def flush(self, timeout: float = DELIVERY_SECONDS) -> None:
        """Wait until every record has been acknowledged or has failed. Raises BrokerError after ``timeout`` seconds."""
        try:
            self._client.flush(timeout)
        except KafkaTimeoutError as error:
            raise explain(error, self.connection, "waiting for acknowledgements") from error

    def close(self, timeout: float = 5.0) -> None:
        """Let the connection go; what is not acknowledged after ``timeout`` seconds fails."""
        try:
            self._client.close(timeout)
        except KafkaTimeoutError:
            log.warning("a producer was closed with records that %s never acknowledged", self.connection.bootstrap)

    def _explain(self, error: BaseException, topic: str, size: int) -> BrokerError:
        if isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError)):
            return BrokerError(
                f"the broker refuses a record of {size} bytes for topic {topic}.",
                "Raise `max.message.bytes` of the topic, or send smaller images.",
            )
        known = error if isinstance(error, Exception) else RuntimeError(repr(error))
        return explain(known, self.connection, f"sending to topic {topic}")


class Producer:
    """Sends samples to the topic that ingest reads.

    >>> with Producer("kafka-1:9092") as producer:
    ...     future = producer.send(image=data, text="a red boat", domain="harbour")
    ...     print(future.result(timeout=30))  # Delivery(topic, partition, offset)

    A sample that ingest would not take is refused here with the same RecordError. Equal samples go to the same
    partition. Leaving the block waits for all acknowledgements; with no ``on_delivery`` it raises BrokerError when a
    record was not delivered. Thread safe.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str = TOPIC,
        *,
        options: Mapping[str, Any] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        encoding: Encoding = "raw",
        on_delivery: Report | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        delivery_seconds: float = DELIVERY_SECONDS,
    ) -> None:
        """Connect.

        Args:
            bootstrap: ``host:port`` of one or more brokers, comma separated.
            topic: what ingest reads.
            options: further options of kafka-python, for TLS and SASL:
                see :attr:`ratchet_client.broker.Connection.options`.
            limits: those of ingest, where it has others than the defaults.
            encoding: how samples are written; see :mod:`ratchet_client.encoding`.
            on_delivery: called for each record, on another thread, with its delivery or its error.
            connect_seconds: longest wait for the connection.
            delivery_seconds: longest wait for the acknowledgement of a record.

        Raises:
            BrokerError: no broker answers within ``connect_seconds``.
            ConfigError: an option that kafka-python does not know, or that is not of its type.
        """
        self.topic = topic
        self.limits = limits
        self.encoding: Encoding = encoding
        self.on_delivery = on_delivery
        self.delivery_seconds = delivery_seconds
        self._sender = RecordSender(Connection(bootstrap, options or {}), connect_seconds, delivery_seconds)
        self._failures: deque[BrokerError] = deque(maxlen=100)

    def send(self, sample: Sample | None = None, /, *, replaces: str = "", **fields: Any) -> Future[Delivery]:
        """Queue one sample, or the fields of one.

        Args:
            sample: what to send; or its fields by name.
            replaces: the id of a sample that this one corrects, and takes the place of. It is needed where image, text,
                question, answer or source are others; with the same ones a sample with other metadata replaces the one
                before.

        Raises:
            RecordError: it is not acceptable.
        """
        checked = sample if sample is not None else make_sample(fields)
        check_sample(checked, self.limits)
        return self.send_checked(checked, replaces)

    def send_checked(self, sample: Sample, replaces: str = "") -> Future[Delivery]:
        """Queue a sample that :func:`check_sample` let pass."""
        future = self._sender.send(self.topic, encode(sample, self.encoding, replaces), note=sample.id)
        future.add_done_callback(self._report)
        return future

    def flush(self, timeout: float | None = None) -> None:
        """Wait for the acknowledgement of all that was sent. Raises BrokerError like leaving the block does."""
        self._sender.flush(self.delivery_seconds if timeout is None else timeout)
        if self._failures:
            failure = self._failures[0]
            self._failures.clear()
            raise failure

    def close(self) -> None:
        """Let the connection go without waiting for long."""
        self._sender.close()

    def __enter__(self) -> Producer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self.close()

    def _report(self, future: Future[Delivery]) -> None:
        error = future.exception()
        outcome = error if isinstance(error, BrokerError) else future.result()
        if self.on_delivery is not None:
            self.on_delivery(outcome)
        elif isinstance(outcome, BrokerError):
            self._failures.append(outcome)


def check_sample(sample: Sample, limits: Limits) -> None:
    """Raise the RecordError that ingest would refuse a sample with."""
    check_text(sample, limits.max_text_chars)
    decode_image(sample.image, limits.max_pixels, limits.max_image_bytes, limits.min_side)
