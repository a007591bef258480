"""Producing and reading records without Ratchet's own producer."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from PIL import Image

from core.child_process import processor_seconds
from core.errors import BrokerError
from core.settings import Settings
from core.settings.streams import Kafka
from core.waiting import StoodStill, wait_for_progress
from streams.ingest.consumer import Consumer
from streams.ingest.ingest_report import IngestStatus
from streams.kafka.clients import ensure_topics
from streams.store.rows import RecordPosition
from tests.support.waiting import patiently

Message = tuple[bytes | None, list[tuple[str, bytes]]]  # value, headers


def picture(seed: int, size: int = 32, kind: str = "PNG") -> bytes:
    """A unique picture per seed: 16 random blocks."""
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(blocks).resize((size, size), Image.Resampling.NEAREST).save(out, kind)
    return out.getvalue()


def good(seed: int, **headers: str) -> Message:
    fields = {"text": f"picture {seed}", **headers}
    return picture(seed), [(f"ratchet_{name}", text.encode()) for name, text in fields.items()]


def make_topics(settings: Settings) -> None:
    kafka = settings.kafka
    patiently(lambda: ensure_topics(kafka, [kafka.topic], kafka.partitions), BrokerError)
    patiently(lambda: ensure_topics(kafka, [kafka.quarantine_topic]), BrokerError)


def produce(kafka: Kafka, messages: Sequence[Message], partition: int | None = None) -> list[RecordPosition]:
    """Send records round robin over the partitions and return their positions in the order given."""
    producer = KafkaProducer(bootstrap_servers=kafka.bootstrap, max_request_size=1 << 26)
    try:
        sent = [
            producer.send(
                kafka.topic, value, key=b"tombstone" if value is None else None, headers=headers,
                partition=number % kafka.partitions if partition is None else partition,
            )
            for number, (value, headers) in enumerate(messages)
        ]  # fmt: skip
        return [(kafka.topic, done.partition, done.offset) for done in (each.get(30) for each in sent)]
    finally:
        producer.close(5)


def read_topic(kafka: Kafka, topic: str, at_least: int = 0) -> list[Any]:
    """All records of a topic: until two quiet polls, and ``at_least`` this many, which must arrive in five minutes."""
    consumer = KafkaConsumer(bootstrap_servers=kafka.bootstrap, auto_offset_reset="earliest")
    try:
        partitions = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        consumer.assign(partitions)
        found: list[Any] = []
        quiet, deadline = 0, time.monotonic() + 300
        while quiet < 2 or len(found) < at_least:
            assert time.monotonic() < deadline, f"{len(found)} records of {at_least} came"
            records = [each for batch in consumer.poll(timeout_ms=300).values() for each in batch]
            quiet = 0 if records else quiet + 1
            found += records
        return found
    finally:
        consumer.close(timeout_ms=1000)


def quarantined_places(kafka: Kafka, at_least: int = 0) -> list[RecordPosition]:
    places = []
    for record in read_topic(kafka, kafka.quarantine_topic, at_least):
        headers = {name: value.decode(errors="replace") for name, value in record.headers}
        places.append((headers["ratchet_topic"], int(headers["ratchet_partition"]), int(headers["ratchet_offset"])))
    return places


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 120.0) -> None:
    """Wait until the condition holds. Fails with what was missing when other threads and the processes below this one
    were idle for ``timeout`` seconds, or after four times as long.
    """
    work = lambda: round(processor_seconds(os.getpid()) - time.thread_time())  # noqa: E731
    try:
        wait_for_progress(
            condition, lambda: what, work=work, still_seconds=timeout, busy_seconds=4 * timeout, pause=0.05
        )
    except StoodStill as error:
        raise AssertionError(f"{what} did not come: {error}") from None


@contextmanager
def reading(
    settings: Settings, on_change: Callable[[IngestStatus], None] | None = None, processes: int = 0
) -> Iterator[Consumer]:
    """Run an ingest on a thread and stop it at the end of the block."""
    ingest = Consumer(settings, on_change=on_change, processes=processes)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            ingest.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="ingest")
    thread.start()
    try:
        yield ingest
    finally:
        ingest.stop()
        thread.join(60)
    assert not thread.is_alive() and not failures, f"ingest ended badly: {failures}"


@contextmanager
def taken(ingest: Consumer, count: int) -> Iterator[None]:
    """Wait at the end of the block until the ingest has dealt with this many more records."""
    seen = records_seen(ingest.status)
    yield
    wait_for(lambda: records_seen(ingest.status) >= seen + count, f"{count} records")


def records_seen(status: IngestStatus) -> int:
    return status.samples + status.duplicates + status.quarantined + status.tombstones
