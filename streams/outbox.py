"""The sending half of a transactional outbox: each entry is in its topic once, whatever is killed or stopped when.

The entries, and which of them are published, are kept elsewhere (events in the ledger). Here:

1. open a :class:`~streams.fenced_sender.FencedSender`: nobody who was there before can send any more;
2. read the topic's tail back: what is there now is all that earlier senders have sent;
3. send what is not there, in one transaction.

After an error of any kind it begins again at 1. A lease is not needed for this to hold, only so that two processes do
not fence one another all the time. A record is in the topic when consumers with ``isolation.level=read_committed`` see
it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from core.errors import BrokerError
from core.settings.streams import Kafka
from ratchet_client.broker import CONNECT_SECONDS, client_options, explain
from ratchet_client.encoding import Encoded
from ratchet_client.producer import Delivery
from streams.clients import connection
from streams.fenced_sender import FencedSender


@dataclass(frozen=True, slots=True)
class OutboxEntry:
    """What is to be in the topic once. ``id`` is made from the fact, never at random; it was not sent before ``time``
    (UTC)."""

    id: str
    record: Encoded
    time: datetime


class Outbox:
    """Publishes entries to one topic. Connects when it is needed. Not thread safe."""

    def __init__(self, topic: str, sender: FencedSender, id_of: Callable[[Any], str | None]) -> None:
        """``id_of`` gives the entry's id of a kafka-python record, None for a record that is not of this outbox."""
        self.topic = topic
        self.sender = sender
        self._id_of = id_of
        self._deliveries: dict[str, Delivery] = {}

    @property
    def kafka(self) -> Kafka:
        """The broker's settings."""
        return self.sender.kafka

    def publish(self, entries: Sequence[OutboxEntry]) -> dict[str, Delivery]:
        """Make sure that each entry is in the topic; where each one is, by id. Entries given before cost nothing.

        Raises:
            Fenced: another process publishes this outbox now.
            BrokerError: some may not have been published; the next call finds out which.
        """
        if not entries:
            return {}
        if not self.sender.opened:
            self._open(min(entry.time for entry in entries))
        missing = [entry for entry in entries if entry.id not in self._deliveries]
        deliveries = self.sender.send_all(self.topic, [entry.record for entry in missing])
        self._deliveries |= {entry.id: place for entry, place in zip(missing, deliveries, strict=True)}
        return {entry.id: self._deliveries[entry.id] for entry in entries}

    def forget(self, ids: Iterable[str]) -> None:
        """Drop what is known of entries that are marked as published, and so are not given again."""
        for each in ids:
            self._deliveries.pop(each, None)

    def close(self) -> None:
        """Let the connection go; the next :meth:`publish` begins anew."""
        self.sender.close()
        self._deliveries = {}

    def _open(self, since: datetime) -> None:
        self._deliveries = {}
        self.sender.open()
        try:
            for record in read_back(self.kafka, self.topic, since):
                entry_id = self._id_of(record)
                if entry_id is not None:
                    self._deliveries.setdefault(entry_id, Delivery(record.topic, record.partition, record.offset))
        except BaseException:
            self.sender.close()
            raise


READ_BACK_SECONDS = 120.0
QUIET_POLLS = 2  # the embedded broker's end offsets can be too low, so the end is where nothing more comes
POLL_MS = 500
#: Records are searched by the time at which they were sent, by the clock of whoever sent them.
CLOCK_SKEW_SECONDS = 3600


def read_back(kafka: Kafka, topic: str, since: datetime) -> Iterator[Any]:
    """The kafka-python records of a topic that were sent after ``since`` (and some from before), to its end.

    Only records of committed transactions and those outside of any, where the broker tells them apart: what is found
    is what consumers with ``isolation.level=read_committed`` see. A topic that does not exist has none.

    Raises:
        BrokerError: the broker cannot be reached, or the end was not reached within :data:`READ_BACK_SECONDS`.
    """
    options = {
        "bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000),
        **client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG),
        "enable_auto_commit": False,
        "auto_offset_reset": "earliest",
        "isolation_level": "read_committed",
        "group_id": None,
    }
    consumer: Any = None
    try:
        consumer = KafkaConsumer(**options)
        yield from _read(consumer, topic, since)
    except (KafkaError, OSError) as error:
        raise explain(error, connection(kafka), f"reading topic {topic} back") from error
    finally:
        if consumer is not None:
            consumer.close(timeout_ms=2000)


def _read(consumer: Any, topic: str, since: datetime) -> Iterator[Any]:
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
