"""Skipping offsets of a partition, for an operator: a row and an audit entry say which, who and why.

The partition is claimed, as another worker would claim it, and its position is moved in the commit that stores the gap.
A worker that reads it finds out with its next commit, which stores nothing, and goes on from the new position.
"""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from kafka import KafkaConsumer, TopicPartition
from kafka.errors import KafkaError

from core.errors import RatchetError, RecordError, SkipRefused, Superseded
from core.ledger import Ledger
from core.settings import Settings
from core.settings.streams import Kafka
from ratchet_client.broker import CONNECT_SECONDS, client_options, explain
from streams.ingest.assignment import start_position
from streams.kafka.clients import Admin, connection
from streams.store.rows import Position, tally_of
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter

ATTEMPTS: Final = 5
"""A worker may claim the partition between our claim and our commit."""
_PARTITION: Final = re.compile(r"([^:]{1,260}):([0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Skipped:
    """Offsets that will not be read."""

    stream: str
    partition: int
    start: int
    """The first of them."""
    until: int
    """Next offset to read."""


@dataclass(frozen=True, slots=True)
class _Log:
    """A partition's log, as the broker has it now."""

    topic_id: str
    first: int
    end: int


def skip(settings: Settings, ledger: Ledger, partition: str, to: int, *, actor: str, reason: str) -> Skipped:
    """Go on with a partition at offset ``to``, and record what lies before it as a gap with the reason ``skipped``.

    Args:
        settings: of the installation whose ingest reads the topic.
        ledger: gets an audit row, before anything changes.
        partition: ``topic:partition``.
        to: the next offset to read.
        actor: who does it.
        reason: why.

    Raises:
        RecordError: ``partition`` is none, or the topic is another one than ingest reads.
        SkipRefused: the partition has been read further already, or its log ends before ``to``.
        BrokerError, StoreUnavailable: nothing was skipped.
    """
    number = _parse(partition, settings.kafka.topic)
    log = _describe(settings.kafka, number)
    store = SampleStore(settings.lake)
    writer = StoreWriter(store.table)
    known = store.positions().values()
    start = start_position(known, settings.kafka.topic, log.topic_id, number, log.first)
    _check(start, to, log)  # before a worker is disturbed
    subject = f"partition {partition}"
    ledger.audit(actor, "skip", subject, {"reason": reason, "stream": start.stream, "from": start.next, "to": to})
    try:
        for _ in range(ATTEMPTS):
            try:
                return _move(writer, start, to, log, f"{actor}: {reason}")
            except Superseded:
                continue
        raise SkipRefused(f"{partition} is claimed by others all the time.", "Stop the workers that fight over it.")
    except RatchetError as error:
        ledger.audit(actor, "skip failed", subject, {"error": str(error)[:1000]})
        raise


def _move(writer: StoreWriter, start: Position, to: int, log: _Log, why: str) -> Skipped:
    [claim] = writer.claim([start])
    position = claim.position
    _check(position, to, log)
    row = {
        "kind": "gap", "topic": position.stream, "partition": position.partition, "offset": position.next, "until": to,
        "reason": "skipped", "detail": f"{to - position.next} offsets: skipped by {why}"[:500],
        "ingested_at": datetime.now(UTC),
    }  # fmt: skip
    # `published` stays: refusals before the gap that are not in their topic yet are published by the next owner.
    moved = replace(position, next=to, leader_epoch=-1, tally=position.tally + tally_of([row]))
    writer.commit([row], [(claim, moved)])
    return Skipped(position.stream, position.partition, position.next, to)


def _check(position: Position, to: int, log: _Log) -> None:
    if to <= position.next:
        raise SkipRefused(
            f"{position.key} has been read up to offset {position.next} already.", "Name a later offset: what was read"
            " stays as it is.",
        )  # fmt: skip
    if to > log.end:
        raise SkipRefused(f"the log of {position.key} ends at offset {log.end}.", f"Name at most {log.end}.")


def _parse(partition: str, topic: str) -> int:
    match = _PARTITION.fullmatch(partition)
    if match is None:
        raise RecordError("position", f"{partition[:300]!r} is no partition.", "It reads topic:partition.")
    if match[1] != topic:
        raise RecordError("position", f"ingest reads the topic {topic}, not {match[1]}.", "See `kafka.topic`.")
    return int(match[2])


def _describe(kafka: Kafka, number: int) -> _Log:
    """Raises BrokerError; SkipRefused where the topic has no such partition."""
    with closing(Admin(kafka)) as admin:
        topic_id = admin.topic_id(kafka.topic)
    if topic_id is None:
        raise SkipRefused(f"there is no topic {kafka.topic}.", "See `kafka.topic` and `kafka.bootstrap`.")
    options = {
        "bootstrap_timeout_ms": int(CONNECT_SECONDS * 1000),
        **client_options(connection(kafka), KafkaConsumer.DEFAULT_CONFIG),
        "group_id": None,
    }
    partition = TopicPartition(kafka.topic, number)
    consumer: Any = None
    try:
        consumer = KafkaConsumer(**options)
        if number not in (consumer.partitions_for_topic(kafka.topic) or ()):
            raise SkipRefused(f"topic {kafka.topic} has no partition {number}.", "Partitions count from 0.")
        [first] = consumer.beginning_offsets([partition]).values()
        [end] = consumer.end_offsets([partition]).values()
    except (KafkaError, OSError) as error:
        raise explain(error, connection(kafka), "looking at the log") from error
    finally:
        if consumer is not None:
            consumer.close(timeout_ms=2000)
    return _Log(topic_id, first, end)
