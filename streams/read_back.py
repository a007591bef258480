"""Reading the tail of a topic that Ratchet itself writes, to find out what is in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from core.errors import BrokerError
from core.settings.streams import Kafka
from ratchet_client.broker import CONNECT_SECONDS, client_options, explain
from streams.clients import connection

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
