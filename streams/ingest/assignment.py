"""Which partitions this process reads, and where it goes on in each: the store decides that, not Kafka."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from kafka import ConsumerRebalanceListener, TopicPartition

from streams.kafka.tolerant_fetch import seek
from streams.store.rows import Position, newest_of_topic, parse_stream, stream_name
from streams.store.writer import Claim

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Reading:
    """Reading one partition, from its claim to its loss."""

    claim: Claim
    next: int
    """Next offset to take in; ahead of the claim's position by what has not been stored yet."""
    leader_epoch: int = -1
    """Of the last record that was validated; with what is stored of it, it goes into the position."""
    next_epoch: int = -1
    """Of the record before ``next``. An older one would make a newer leader's records look like a truncated log."""
    taken: int = -1
    """The offset behind the last record that was taken in. Up to ``next`` there are others of which no reader gets a
    record: markers of transactions, aborted records, what compaction removed."""

    @classmethod
    def of(cls, claim: Claim) -> Reading:
        """Read on from a claim's position."""
        return cls(claim, claim.position.next, claim.position.leader_epoch, claim.position.leader_epoch)

    @property
    def stream(self) -> str:
        """The topic with its generation."""
        return self.claim.position.stream

    @property
    def partition(self) -> int:
        """The partition's number."""
        return self.claim.position.partition

    def behind(self, end: int) -> tuple[int, int]:
        """The next offset, and the leader epoch of what lies before it, once all before ``end`` is stored."""
        return (self.next, self.next_epoch) if self.taken <= end < self.next else (end, self.leader_epoch)

    @property
    def stored(self) -> int:
        """Next offset as the store has it."""
        return self.claim.position.next


def start_position(known: Iterable[Position], topic: str, topic_id: str, partition: int, first: int) -> Position:
    """Where to go on with a partition whose log begins at offset ``first``.

    A topic whose id is not the one in the store has lost its log (an embedded broker that was restarted, a topic that
    was deleted and made again): its offsets mean other records now, so it is read from its beginning, as a new
    generation. An id that is missing, here or there, tells nothing: a broker that has none was used before, or is now.
    """
    newest = newest_of_topic(known, topic)
    mine = newest.get(partition)
    if mine is not None and mine.topic_id == topic_id:
        return mine
    if mine is not None and not (mine.topic_id and topic_id):
        return replace(mine, topic_id=mine.topic_id or topic_id)
    generations = {parse_stream(each.stream)[1]: each.topic_id for each in newest.values()}
    same = [number for number, id_ in generations.items() if id_ == topic_id]
    generation = max(same) if same else max(generations, default=-1) + 1
    if mine is not None:
        log.warning(
            "topic %s is a new log (id %s, was %s): partition %d had been read up to %d of the old one, and is now read"
            " from its beginning as %s",
            topic, topic_id, mine.topic_id, partition, mine.next, stream_name(topic, generation),
        )  # fmt: skip
    return Position(stream_name(topic, generation), partition, first, topic_id, published=first)


def new_generation(known: Iterable[Position], position: Position, start: int) -> Position:
    """Where to go on with a log that was cut off at ``start``, behind which other records stand now."""
    topic, _ = parse_stream(position.stream)
    highest = max(parse_stream(each.stream)[1] for each in (*known, position))
    stream = stream_name(topic, highest + 1)
    return Position(stream, position.partition, start, position.topic_id, published=start)


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """The partitions that the group gave to this process.

    Kafka's thread calls the two listener methods, which only take notes: it must not wait for the store. The consumer's
    loop claims what is new. A partition that is lost and comes back has a new reading, so what was read under the old
    one can be told apart and is dropped.
    """

    def __init__(self, consumer: Any, topic: str) -> None:
        self.consumer = consumer
        self.topic = topic
        self.joined = False
        """Whether the group has said what is ours, be it nothing; not while it is being joined, again or at first."""
        self._lock = threading.Lock()
        self._assigned: set[int] = set()
        self._readings: dict[int, Reading] = {}

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Nothing is fetched of them before they are claimed."""
        for partition in assigned:
            self.consumer.seek(partition, 0)
            self.consumer.pause(partition)
            with self._lock:
                self._assigned.add(partition.partition)
                self._readings.pop(partition.partition, None)
        self.joined = True

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Forget them; what was read and not stored is read again by the next owner."""
        self.joined = False
        with self._lock:
            for each in revoked:
                self._assigned.discard(each.partition)
                self._readings.pop(each.partition, None)

    def on_partitions_lost(self, lost: Iterable[TopicPartition]) -> None:
        """The group went on without this process."""
        self.on_partitions_revoked(lost)

    def unclaimed(self) -> list[int]:
        """Partitions that are ours and that nobody reads yet."""
        with self._lock:
            return sorted(self._assigned - self._readings.keys())

    def begin(self, reading: Reading) -> bool:
        """Read a partition on from where ``reading`` stands. False when it is not ours any more."""
        partition = TopicPartition(self.topic, reading.partition)
        with self._lock:
            if reading.partition not in self._assigned:
                return False
            self._readings[reading.partition] = reading
        seek(self.consumer, partition, reading.next, reading.next_epoch)
        self.consumer.resume(partition)
        return True

    def give_up(self, reading: Reading) -> None:
        """Another process has claimed it, or its log is another: it has to be claimed anew."""
        with self._lock:
            if self._readings.get(reading.partition) is reading:
                del self._readings[reading.partition]
                if reading.partition in self._assigned:
                    self.consumer.pause(TopicPartition(self.topic, reading.partition))

    def reading(self, partition: int) -> Reading | None:
        """The reading of a partition, or None when it is not ours (any more)."""
        with self._lock:
            return self._readings.get(partition)

    def holds(self, reading: Reading) -> bool:
        """Whether what was read under ``reading`` is still ours to store."""
        return self.reading(reading.partition) is reading

    def all(self) -> list[Reading]:
        """All readings."""
        with self._lock:
            return [self._readings[number] for number in sorted(self._readings)]
