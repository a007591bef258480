"""Which partitions this process reads, and how far it has come in each: the store decides where it starts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kafka import ConsumerRebalanceListener, TopicPartition

from streams.rows import Position, Snapshot, parse_stream, stream_name
from streams.store import SampleStore

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Cursor:
    """Reading one partition, from its assignment to its loss."""

    stream: str
    partition: int
    topic_id: str
    stored: int | None
    """Next offset in the store; None while the store has none for this stream."""
    published: int = 0
    next: int = 0
    """Next offset to take in; ahead of ``stored`` by what is in the batch."""
    recovered: bool = False
    """Whether refusals of an earlier life have been published."""

    @property
    def key(self) -> str:
        """As in the store's offsets."""
        return f"{self.stream}:{self.partition}"


def open_cursor(snapshot: Snapshot, topic: str, topic_id: str, partition: int) -> Cursor:
    """Where to go on with a partition.

    A topic whose id is not the one in the store has lost its log (an embedded broker that was restarted, a topic that
    was deleted and made again): its offsets mean other records now, so it is read from its beginning, as a new
    generation.
    """
    newest = snapshot.of_topic(topic)
    mine = newest.get(partition)
    if mine is not None and mine.topic_id == topic_id:
        return Cursor(mine.stream, partition, topic_id, mine.next, mine.published, mine.next)
    generations = {parse_stream(each.stream)[1]: each.topic_id for each in newest.values()}
    same = [number for number, known in generations.items() if known == topic_id]
    generation = max(same) if same else max(generations, default=-1) + 1
    if mine is not None:
        log.warning(
            "topic %s is a new log (id %s, was %s): partition %d had been read up to %d of the old one, and is now read"
            " from its beginning as %s",
            topic, topic_id, mine.topic_id, partition, mine.next, stream_name(topic, generation),
        )  # fmt: skip
    return Cursor(stream_name(topic, generation), partition, topic_id, None)


def next_generation(cursor: Cursor, snapshot: Snapshot) -> Cursor:
    """A cursor for a log that was cut behind what had been read, though the topic kept its id."""
    topic, _ = parse_stream(cursor.stream)
    highest = max(parse_stream(each.stream)[1] for each in snapshot.positions.values())
    return Cursor(stream_name(topic, highest + 1), cursor.partition, cursor.topic_id, None)


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """The cursors of the partitions that the group gave to this process.

    Kafka's thread calls the two listener methods; the ingest loop reads. A partition that is lost and comes back has a
    new cursor, so what was read under the old one can be told apart and is dropped.
    """

    def __init__(self, consumer: Any, store: SampleStore, topic: str, topic_id: str) -> None:
        self.consumer = consumer
        self.store = store
        self.topic = topic
        self.topic_id = topic_id
        self.joined = False
        """Whether the group has said what is ours, be it nothing; not while it is being joined, again or at first."""
        self._lock = threading.Lock()
        self._cursors: dict[int, Cursor] = {}

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """Go on where the store says, whatever Kafka remembers."""
        snapshot = self.store.snapshot()
        for partition in sorted(each.partition for each in assigned):
            self._start(open_cursor(snapshot, self.topic, self.topic_id, partition))
        self.joined = True

    def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """Forget them; what was read and not stored is read again by the next owner."""
        self.joined = False
        with self._lock:
            for each in revoked:
                self._cursors.pop(each.partition, None)

    def replace(self, cursor: Cursor) -> None:
        """Read a partition on with another cursor."""
        self._start(cursor)

    def rewind(self, partition: int) -> None:
        """Read a partition, if it is ours, from where its cursor stands."""
        cursor = self.cursor(partition)
        if cursor is not None:
            self._start(cursor)

    def cursor(self, partition: int) -> Cursor | None:
        """The cursor of a partition, or None when it is not ours (any more)."""
        with self._lock:
            return self._cursors.get(partition)

    def holds(self, cursor: Cursor) -> bool:
        """Whether what was read under ``cursor`` is still ours to store."""
        return self.cursor(cursor.partition) is cursor

    def all(self) -> list[Cursor]:
        """All cursors."""
        with self._lock:
            return [self._cursors[number] for number in sorted(self._cursors)]

    def _start(self, cursor: Cursor) -> None:
        partition = TopicPartition(self.topic, cursor.partition)
        with self._lock:
            self._cursors[cursor.partition] = cursor
        if cursor.stored is None:
            self.consumer.seek_to_beginning(partition)
        else:
            self.consumer.seek(partition, cursor.stored)


def position_after(cursor: Cursor, refused: bool) -> Position:
    """The position to store with a batch: ``refused`` tells whether it holds refusals, which are published after it."""
    clean = not refused and cursor.published == (cursor.stored or 0)
    published = cursor.next if clean else cursor.published
    return Position(cursor.stream, cursor.partition, cursor.next, cursor.topic_id, published)
