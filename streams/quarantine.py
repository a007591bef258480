"""The quarantine topic: every refused record, as it came, with the reason and where it was.

A message has the original key, value and headers, and besides

    ratchet_reason      one of streams.records.REASONS
    ratchet_detail      the reason in words
    ratchet_topic, ratchet_partition, ratchet_offset      position of the original (topic@n: n-th log of that name)
    ratchet_refused_at  UTC, ISO 8601

so a mended record can be sent again as it is. Each refused record is published once, whatever is killed when: its row
was stored in the commit of its batch, and what the store has but the topic does not is published at the next start.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from ops.errors import BrokerError
from ops.settings import Kafka
from streams.clients import CONNECT_SECONDS, client_options, explain
from streams.codecs import Encoded, Headers
from streams.producer import Delivery, RecordSender

log = logging.getLogger(__name__)
PUBLISH_SECONDS = 20.0
READ_BACK_SECONDS = 120.0
QUIET_POLLS = 2  # the embedded broker's end offsets are too low, so the end is where nothing more comes
_CLOCK_SKEW_MS = 3_600_000

Row = Mapping[str, Any]
Place = tuple[str, int, int]


def place(row: Row) -> Place:
    """Stream, partition and offset of a refused record's row."""
    return row["topic"], row["partition"], row["offset"]


def message(row: Row) -> Encoded:
    """What is published for a refused record's row."""
    refused_at: datetime = row["ingested_at"]
    ours = {
        "reason": row["reason"],
        "detail": row["detail"],
        "topic": row["topic"],
        "partition": str(row["partition"]),
        "offset": str(row["offset"]),
        "refused_at": refused_at.isoformat(),
    }
    came = original(row)
    headers: Headers = [*came.headers, *((f"ratchet_{name}", text.encode()) for name, text in ours.items())]
    # Brokers take a record with neither; the client does not send one.
    return Encoded(came.key, b"" if came.value is None and came.key is None else came.value, headers)


def original(row: Row) -> Encoded:
    """The record of a refused record's row, as it came."""
    headers = [
        (name, b"" if value is None else base64.b64decode(value)) for name, value in json.loads(row["original_headers"])
    ]
    return Encoded(row["original_key"], row["original"], headers)


class Quarantine:
    """Publishes refused records. Makes its connections when they are needed."""

    def __init__(self, kafka: Kafka) -> None:
        self.kafka = kafka
        self._sender: RecordSender | None = None

    def publish(self, rows: Sequence[Row]) -> None:
        """Publish rows that are known not to be in the topic, and wait for all acknowledgements.

        Raises:
            BrokerError: some may not have been published; :meth:`recover` will find out which.
        """
        if not rows:
            return
        try:
            if self._sender is None:
                self._sender = RecordSender(self.kafka, CONNECT_SECONDS, PUBLISH_SECONDS)
            sent: list[Future[Delivery]] = [
                self._sender.send(self.kafka.quarantine_topic, message(row)) for row in rows
            ]
            self._sender.flush(PUBLISH_SECONDS)
            for future in sent:
                future.result(timeout=1)
        except BrokerError:
            self.close()  # an idempotent producer that lost a record cannot go on
            raise

    def recover(self, rows: Sequence[Row]) -> int:
        """Publish those of ``rows`` that the topic does not have yet. Returns their number."""
        if not rows:
            return 0
        there = self.read_back(min(row["ingested_at"] for row in rows))
        missing = [row for row in rows if place(row) not in there]
        log.info("quarantine: %d of %d stored refusals were not published yet", len(missing), len(rows))
        self.publish(missing)
        return len(missing)

    def read_back(self, since: datetime) -> set[Place]:
        """Places of the refused records in the topic that were published after ``since``. Raises BrokerError."""
        options = client_options(self.kafka, KafkaConsumer.DEFAULT_CONFIG)
        consumer: Any = None
        try:
            consumer = KafkaConsumer(
                **{
                    "bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000),
                    "enable_auto_commit": False,
                    "auto_offset_reset": "earliest",
                    **options,
                }
            )
            return self._read(consumer, int(since.timestamp() * 1000) - _CLOCK_SKEW_MS)
        except (KafkaError, OSError) as error:
            raise explain(error, self.kafka, "reading the quarantine topic") from error
        finally:
            if consumer is not None:
                consumer.close(timeout_ms=2000)

    def close(self) -> None:
        """Give up the connection."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close(timeout=1.0)

    def _read(self, consumer: Any, since_ms: int) -> set[Place]:
        topic = self.kafka.quarantine_topic
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        for partition, found in consumer.offsets_for_times(dict.fromkeys(partitions, since_ms)).items():
            consumer.seek(partition, found.offset if found else ends[partition])
        places: set[Place] = set()
        quiet, deadline = 0, time.monotonic() + READ_BACK_SECONDS
        while quiet < QUIET_POLLS or any(consumer.position(each) < ends[each] for each in partitions):
            if time.monotonic() > deadline:
                raise BrokerError(
                    f"topic {topic} could not be read back within {READ_BACK_SECONDS:.0f} s.",
                    "Is the broker overloaded? Ingest tries again.",
                )
            records = consumer.poll(timeout_ms=500)
            quiet = 0 if records else quiet + 1
            for record in (each for batch in records.values() for each in batch):
                headers = dict(record.headers)
                if {"ratchet_topic", "ratchet_partition", "ratchet_offset"} <= headers.keys():
                    stream = headers["ratchet_topic"].decode()
                    places.add((stream, int(headers["ratchet_partition"]), int(headers["ratchet_offset"])))
        return places
