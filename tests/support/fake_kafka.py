"""An in-process broker for rare events of a real one: truncated logs, deletion of unread records, refused sizes.

:func:`install` replaces an ingest's Kafka clients; the consumer, the store and all between are the real ones. A record
is in the quarantine topic when :attr:`FakeKafka.quarantine` has it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from kafka import OffsetAndMetadata, TopicPartition
from kafka.errors import LogTruncationError, OffsetOutOfRangeError

from core.errors import BrokerError, Fenced, RecordTooLarge
from core.settings.streams import Kafka
from ratchet_client.encoding import Encoded
from ratchet_client.producer import Delivery
from streams.ingest.membership import POLL_RECORDS, IngestClients
from streams.kafka.clients import Topic


@dataclass
class FakePartition:
    """A log; everything before ``start`` was deleted."""

    start: int = 0
    records: list[Any] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.records)


class FakeKafka:
    """One topic, and the quarantine topic. Thread safe."""

    def __init__(self, topic: str, partitions: int = 1) -> None:
        self.topic = topic
        self.topic_id: str | None = "id-1"
        self.logs = {number: FakePartition() for number in range(partitions)}
        self.assigned = set(self.logs)
        """The consumer's partitions according to the group."""
        self.away = False
        self.quarantine_away = False
        """Only the quarantine topic refuses records."""
        self.repeats = False
        """Each fetch begins with the first record of the log."""
        self.max_bytes = 1 << 30
        self.quarantine: list[Encoded] = []
        self.owners: Counter[str] = Counter()
        self.open_senders: set[FakeSender] = set()
        self.committed: dict[int, int] = {}
        self.created: list[str] = []
        self.fetched_from: list[tuple[int, int, int]] = []
        """Partition, offset and leader epoch of each seek."""
        self.polls = 0
        self.changed = threading.Condition()

    def send(self, *messages: tuple[bytes | None, Any], partition: int = 0, epoch: int = 0, **fields: Any) -> None:
        with self.changing(partition) as log:
            for value, headers in messages:
                plain = {"value": value, "key": None, "headers": headers, "timestamp": -1, **fields}
                log.records.append(SimpleNamespace(offset=log.end, leader_epoch=epoch, **plain))

    def skip(self, count: int = 1, partition: int = 0, epoch: int = 0) -> None:
        """Append offsets without a readable record: the marker of a transaction, or aborted records."""
        with self.changing(partition) as log:
            for _ in range(count):
                log.records.append(SimpleNamespace(offset=log.end, leader_epoch=epoch, hidden=True))

    def delete_before(self, offset: int, partition: int = 0) -> None:
        with self.changing(partition) as log:
            del log.records[: offset - log.start]
            log.start = offset

    def cut_off(self, offset: int, partition: int = 0) -> None:
        """Truncate everything from ``offset`` on, as an unclean election does."""
        with self.changing(partition) as log:
            del log.records[offset - log.start :]

    def assign(self, *partitions: int) -> None:
        with self.changing():
            self.assigned = set(partitions)

    @contextmanager
    def changing(self, partition: int = 0) -> Iterator[FakePartition]:
        with self.changed:
            yield self.logs[partition]
            self.changed.notify_all()

    def check(self, away: bool = False) -> None:
        if self.away or away:
            raise BrokerError("the broker is away.")

    def names(self) -> list[str]:
        places = ("ratchet_topic", "ratchet_partition", "ratchet_offset")
        return [b":".join(dict(record.headers)[name] for name in places).decode() for record in self.quarantine]


class FakeConsumer:
    """The part of KafkaConsumer that Ratchet uses."""

    def __init__(self, broker: FakeKafka) -> None:
        self.broker = broker
        self._positions: dict[int, OffsetAndMetadata] = {}
        self._paused: set[int] = set()
        self._highwater: dict[int, int] = {}
        assigned = SimpleNamespace(get=lambda each: SimpleNamespace(position=self._positions.get(each.partition)))
        self._subscription = SimpleNamespace(seek=self._seek, assignment=assigned)
        cluster = SimpleNamespace(config={}, partitions_for_topic=self.partitions_for_topic)
        self._client = SimpleNamespace(cluster=cluster)

    def subscribe(self, topics: Sequence[str], listener: Any) -> None:
        self._listener = listener

    def partitions_for_topic(self, topic: str) -> set[int]:
        return set(self.broker.logs)

    def poll(self, timeout_ms: int) -> dict[TopicPartition, list[Any]]:
        with self.broker.changed:
            self.broker.polls += 1
            self._rebalance()
            if found := self._fetch():
                return found
            self.broker.changed.wait(min(timeout_ms / 1000, 0.02))  # otherwise a stop would have to wait
            self._rebalance()
            return self._fetch()

    def _rebalance(self) -> None:
        ours = set(self._positions)
        if ours - self.broker.assigned:
            self._listener.on_partitions_revoked([self._partition(n) for n in ours])
            self._positions, ours = {}, set()
        if new := self.broker.assigned - ours:
            self._positions |= dict.fromkeys(new, OffsetAndMetadata(0, "", -1))
            self._listener.on_partitions_assigned([self._partition(n) for n in new])

    def _fetch(self) -> dict[TopicPartition, list[Any]]:
        found: dict[TopicPartition, list[Any]] = {}
        cut: dict[TopicPartition, OffsetAndMetadata | None] = {}
        for number, position in self._positions.items():
            log = self.broker.logs[number]
            if number in self._paused or self.broker.away:
                continue
            past = [record for record in log.records if record.leader_epoch <= position.leader_epoch]
            known_end = past[-1].offset + 1 if past else log.start
            if position.leader_epoch >= 0 and known_end < position.offset:
                cut[self._partition(number)] = OffsetAndMetadata(known_end, "", position.leader_epoch) if past else None
                continue
            if not log.start <= position.offset <= log.end:
                raise OffsetOutOfRangeError({self._partition(number): position.offset})
            records = log.records[position.offset - log.start :][:POLL_RECORDS]
            self._highwater[number] = log.end
            if records:
                before = log.records[: records[0].offset - log.start] if self.broker.repeats else []
                shown = [record for record in (*before, *records) if not hasattr(record, "hidden")]
                found |= {self._partition(number): shown} if shown else {}
                self._positions[number] = OffsetAndMetadata(records[-1].offset + 1, "", records[-1].leader_epoch)
        if cut:
            raise LogTruncationError(cut)
        return found

    def _partition(self, number: int) -> TopicPartition:
        return TopicPartition(self.broker.topic, number)

    def seek(self, partition: TopicPartition, offset: int) -> None:
        self._seek(partition, OffsetAndMetadata(offset, "", -1))

    def _seek(self, partition: TopicPartition, position: OffsetAndMetadata) -> None:
        self._positions[partition.partition] = position
        self.broker.fetched_from.append((partition.partition, position.offset, position.leader_epoch))

    def pause(self, *partitions: TopicPartition) -> None:
        self._paused |= {each.partition for each in partitions}

    def resume(self, *partitions: TopicPartition) -> None:
        self._paused -= {each.partition for each in partitions}

    def beginning_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return {each: self.broker.logs[each.partition].start for each in partitions}

    def end_offsets(self, partitions: Sequence[TopicPartition]) -> dict[TopicPartition, int]:
        return {each: self.broker.logs[each.partition].end for each in partitions}

    def highwater(self, partition: TopicPartition) -> int | None:
        return self._highwater.get(partition.partition)

    def commit(self, offsets: dict[TopicPartition, OffsetAndMetadata], timeout_ms: int) -> None:
        self.broker.committed |= {partition.partition: at.offset for partition, at in offsets.items()}

    def close(self, autocommit: bool, timeout_ms: int) -> None:
        self._positions = {}


class FakeAdmin:
    """The part of its own Admin that Ratchet uses."""

    def __init__(self, broker: FakeKafka) -> None:
        self.broker = broker

    def topic(self, topic: str) -> Topic | None:
        self.broker.check()
        return None if self.broker.topic_id is None else Topic(self.broker.topic_id, len(self.broker.logs))

    def topic_id(self, topic: str) -> str | None:
        found = self.topic(topic)
        return None if found is None else found.id

    def ensure_topics(self, topics: Sequence[str], partitions: int = 1) -> None:
        self.broker.check()
        self.broker.created += topics

    def warn_of_defaults(self, topic: str, partitions: int) -> None: ...

    def close(self) -> None: ...


class FakeSender:
    def __init__(self, broker: FakeKafka, name: str, still_owner: Callable[[], bool]) -> None:
        self.broker, self.name, self._still_owner = broker, name, still_owner
        self._number = 0

    @property
    def opened(self) -> bool:
        return self in self.broker.open_senders

    def open(self) -> None:
        self.broker.check()
        self.broker.owners[self.name] += 1
        self._number = self.broker.owners[self.name]
        self.broker.open_senders.add(self)

    def read_back(self, topic: str, since: datetime) -> Iterator[Any]:
        for number, record in enumerate(list(self.broker.quarantine)):
            yield SimpleNamespace(topic=topic, partition=0, offset=number, headers=record.headers)

    def send_all(self, topic: str, records: Sequence[Encoded]) -> list[Delivery]:
        self.broker.check(self.broker.quarantine_away)
        if not self._still_owner() or self._number != self.broker.owners[self.name]:
            raise Fenced("there is a newer one.")
        for record in records:
            size = len(record.value or b"") + len(record.key or b"") + sum(len(n) + len(v) for n, v in record.headers)
            if size > self.broker.max_bytes:
                raise RecordTooLarge("it is too large.")
        with self.broker.changing():
            first = len(self.broker.quarantine)
            self.broker.quarantine += records
        return [Delivery(topic, 0, first + number) for number in range(len(records))]

    def close(self) -> None:
        self.broker.open_senders.discard(self)


class FakeClients(IngestClients):
    def __init__(self, broker: FakeKafka, kafka: Kafka) -> None:
        super().__init__(kafka)
        self.broker = broker

    def admin(self) -> Any:
        return FakeAdmin(self.broker)

    def consumer(self) -> Any:
        return FakeConsumer(self.broker)

    def sender(self, name: str, still_owner: Callable[[], bool]) -> Any:
        return FakeSender(self.broker, name, still_owner)


def install(broker: FakeKafka, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("streams.ingest.consumer.IngestClients", lambda kafka: FakeClients(broker, kafka))
