"""Publishes each entry of an outbox to its topic exactly once, across crashes and pauses. The entries, and which of
them are published, are stored elsewhere (events in the ledger, quarantined records in the sample store). The steps:

1. open a :class:`FencedSender`: earlier senders can send no more;
2. read the topic's tail back: it has everything that earlier senders sent;
3. send what is missing, in one transaction. Any error starts again at 1.

Kafka's transactional producer fences: after ``open`` the broker rejects earlier senders with the same transactional ID,
even a process that was paused (SIGSTOP) and resumes later. A lease only keeps two processes from fencing one another
all the time. Two faults of the embedded broker (Tansu 0.6.0) matter here: records of an aborted transaction are visible
to all consumers, and a commit with an outdated epoch closes the connection, which kafka-python retries for ever; so the
commit has a time limit.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from kafka import KafkaProducer, TopicPartition
from kafka.errors import (
    InvalidProducerEpochError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    ProducerFencedError,
    RecordListTooLargeError,
    TransactionalIdAuthorizationFailedError,
)

from core.errors import BrokerError, Fenced, RecordTooLarge
from core.settings.streams import Kafka
from ratchet_client.broker import CONNECT_SECONDS, MAX_RECORD_BYTES, client_options, explain
from ratchet_client.encoding import Encoded
from ratchet_client.producer import BATCH_BYTES, Delivery
from streams.kafka.clients import connection, reading_alone

log = logging.getLogger(__name__)
SEND_SECONDS = 20.0
#: The broker aborts a dead sender's open transaction after this; consumers wait at most that long.
TRANSACTION_SECONDS = 30.0
READ_BACK_SECONDS = 120.0
QUIET_POLLS = 2  # the embedded broker's end offsets can be too low, so the end is where nothing more arrives
POLL_MS = 500
#: Records are searched by the send time of their sender's clock.
CLOCK_SKEW_SECONDS = 3600

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """A record to publish once. ``id`` is derived from the fact, never random; it was not sent before ``time``
    (UTC)."""

    id: str
    record: Encoded
    time: datetime


class Outbox:
    """Publishes entries to one topic. Connects on demand. Not thread safe."""

    def __init__(self, topic: str, sender: FencedSender, id_of: Callable[[Any], str | None]) -> None:
        """``id_of`` returns the entry ID of a kafka-python record, None for a record of another outbox."""
        self.topic = topic
        self.sender = sender
        self._id_of = id_of
        self._deliveries: dict[str, Delivery] = {}

    def publish(self, entries: Sequence[OutboxEntry]) -> dict[str, Delivery]:
        """Make sure that each entry is in the topic. Returns their places by ID. Entries published before cost nothing.
        Raises Fenced if another process publishes this outbox now; BrokerError if some may not have been published,
        which the next call finds out."""
        if not entries:
            return {}
        if not self.sender.opened:
            self._open(min(entry.time for entry in entries))
        missing = [entry for entry in entries if entry.id not in self._deliveries]
        deliveries = self.sender.send_all(self.topic, [entry.record for entry in missing])
        self._deliveries |= {entry.id: place for entry, place in zip(missing, deliveries, strict=True)}
        return {entry.id: self._deliveries[entry.id] for entry in entries}

    def forget(self, ids: Iterable[str]) -> None:
        for each in ids:
            self._deliveries.pop(each, None)

    def close(self) -> None:
        """Close the connection; the next :meth:`publish` starts over."""
        self.sender.close()
        self._deliveries = {}

    def _open(self, since: datetime) -> None:
        self._deliveries = {}
        self.sender.open()
        try:
            for record in self.sender.read_back(self.topic, since):
                entry_id = self._id_of(record)
                if entry_id is not None:
                    self._deliveries.setdefault(entry_id, Delivery(record.topic, record.partition, record.offset))
        except BaseException:
            self.sender.close()
            raise


class FencedSender:
    """Sends groups of records, each in one transaction. Not thread safe. Any error closes the sender, and leaves
    unknown whether the failed call's records are in the topic. After the next ``open`` that can no longer change, so
    reading the topic back (``read_committed``) tells."""

    def __init__(
        self,
        kafka: Kafka,
        transactional_id: str,
        still_owner: Callable[[], bool] = lambda: True,
        seconds: float = SEND_SECONDS,
    ) -> None:
        """``still_owner`` is called before each send; False raises Fenced. ``seconds``: time limit of a call."""
        self.kafka = kafka
        self.transactional_id = transactional_id
        self._still_owner = still_owner
        self._seconds = seconds
        self._client: Any = None

    @property
    def opened(self) -> bool:
        return self._client is not None

    def open(self) -> None:
        """Fence earlier senders with the same transactional ID and abort their open transaction. Raises BrokerError if
        no broker answers, or it does not allow the transactional ID, or has no transactions."""
        self.close()
        try:
            self._client = self._connect()
            self._client.init_transactions()
        except (KafkaError, OSError) as error:
            self.close()
            raise self._explain_open(error) from error

    def send_all(self, topic: str, records: Sequence[Encoded]) -> list[Delivery]:
        """Send all records or none. Returns their places, in order. Raises Fenced if a newer sender with the same ID
        was opened, or ``still_owner`` returned False; RecordTooLarge if the broker rejects one for its size;
        BrokerError for any other failure: the records may be in the topic or not."""
        if not records:
            return []
        if self._client is None:
            raise BrokerError(f"the sender {self.transactional_id} is not open.", "Call `open` first.")
        try:
            if not self._still_owner():
                raise self._fenced("its lease was lost")
            return self._send(topic, records)
        except BaseException:
            self.close()
            raise

    def read_back(self, topic: str, since: datetime) -> Iterator[Any]:
        return read_back(self.kafka, topic, since)

    def close(self) -> None:
        """Close the connection; the next :meth:`open` or the broker aborts an open transaction."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(KafkaError):
                client.close(timeout=1.0)

    def _connect(self) -> Any:
        bounds: dict[str, Any] = {
            "bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000),
            "delivery_timeout_ms": int(self._seconds * 1000),
            "request_timeout_ms": int(self._seconds * 500),
            "max_block_ms": int(self._seconds * 1000),
            "reconnect_backoff_max_ms": 1000,
            "max_request_size": MAX_RECORD_BYTES,
            "batch_size": BATCH_BYTES,
            **client_options(connection(self.kafka), KafkaProducer.DEFAULT_CONFIG),
            "acks": "all",
            "enable_idempotence": True,
            "transactional_id": self.transactional_id,
            "transaction_timeout_ms": int(TRANSACTION_SECONDS * 1000),
        }
        return KafkaProducer(**bounds)

    def _send(self, topic: str, records: Sequence[Encoded]) -> list[Delivery]:
        index = 0
        try:
            self._client.begin_transaction()
            queued = []
            for index in range(len(records)):
                record = records[index]
                headers = list(record.headers)
                queued.append(self._client.send(topic, record.value, key=record.key, headers=headers))
            self._client.flush(self._seconds)
            deliveries = []
            for index in range(len(queued)):
                metadata = queued[index].get(timeout=1)
                deliveries.append(Delivery(metadata.topic, metadata.partition, metadata.offset))
            _within(self._seconds, self._client.commit_transaction)
            return deliveries
        except (KafkaError, OSError) as error:
            raise self._explain_send(error, topic, index) from error

    def _explain_send(self, error: Exception, topic: str, index: int) -> BrokerError:
        # In a producer's fatal state, kafka-python wraps the reason in the text of a plain KafkaError.
        if isinstance(error, (ProducerFencedError, InvalidProducerEpochError)) or "ProducerFenced" in str(error):
            return self._fenced("the broker has a newer one")
        if isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError)):
            too_large = RecordTooLarge(
                f"the broker does not take record {index + 1} of {topic} for its size ({error}).",
                "Raise `max.message.bytes` of the topic.",
            )
            too_large.index = index
            return too_large
        return explain(error, connection(self.kafka), f"sending to topic {topic}")

    def _explain_open(self, error: Exception) -> BrokerError:
        if isinstance(error, TransactionalIdAuthorizationFailedError):
            return BrokerError(
                f"the broker {self.kafka.bootstrap} does not allow the transactional id {self.transactional_id!r}.",
                "Allow Write and Describe on this TransactionalId for the user in `kafka.client`.",
            )
        if isinstance(error, KafkaTimeoutError) and "transactional" in str(error):
            return BrokerError(
                f"the broker {self.kafka.bootstrap} did not register the transactional id in {self._seconds:.0f} s.",
                "Has it enough nodes for `transaction.state.log.replication.factor`?",
            )
        return explain(error, connection(self.kafka), "opening a transactional producer")

    def _fenced(self, why: str) -> Fenced:
        return Fenced(
            f"the sender {self.transactional_id} may not send any more: {why}.",
            "Nothing needs to be done: the process that took over sends what is missing.",
        )


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """Add a time limit to a call. Raises KafkaTimeoutError, and leaves the call running."""
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="kafka-commit", daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        raise KafkaTimeoutError(f"no answer to the commit of a transaction within {seconds:.0f} s") from None


def read_back(kafka: Kafka, topic: str, since: datetime) -> Iterator[Any]:
    """Yield a topic's kafka-python records sent after ``since`` (and some earlier ones), to its end. Aborted records
    are left out if the broker tells them apart: the result is what ``isolation.level=read_committed`` consumers see. A
    missing topic has none. Raises BrokerError if the broker cannot be reached, or the end was not reached within
    :data:`READ_BACK_SECONDS`."""
    options = {"enable_auto_commit": False, "auto_offset_reset": "earliest", "isolation_level": "read_committed"}
    with reading_alone(kafka, f"reading topic {topic} back", **options) as consumer:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        if not partitions:
            return
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        since_ms = int((since.timestamp() - CLOCK_SKEW_SECONDS) * 1000)
        for partition, start in consumer.offsets_for_times(dict.fromkeys(partitions, since_ms)).items():
            consumer.seek(partition, start.offset if start else ends[partition])
        quiet, deadline = 0, time.monotonic() + READ_BACK_SECONDS
        while quiet < QUIET_POLLS or any(consumer.position(each) < ends[each] for each in partitions):
            if time.monotonic() > deadline:
                raise BrokerError(
                    f"topic {topic} could not be read back within {READ_BACK_SECONDS:.0f} s.",
                    "Is the broker overloaded? It is tried again.",
                )
            batches = consumer.poll(timeout_ms=POLL_MS)
            quiet = 0 if batches else quiet + 1
            for records in batches.values():
                yield from records
