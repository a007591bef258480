"""A KafkaConsumer whose ``poll`` skips what kafka-python cannot read, and reports it.

kafka-python 3.0 raises out of ``poll``, and stays at its position, when a batch has a wrong checksum, an unknown format
or a broken payload, or a record has a header name that is not UTF-8. After ``install(consumer)``, ``poll`` returns a
``Corrupt`` for each such offset, and moves past it. Transactions, control batches, positions and metrics remain
kafka-python's own code: it gets batches (:mod:`streams.kafka.record_batches`) that never raise, and whose unreadable
records carry their ``Corrupt`` in the checksum field.

**Finding the batches of a fetch.** A batch's checksum does not cover its offset and length, so those are trusted only
if they agree with the fetch: with the requested position, the next batch, the end of the log. Otherwise the batch is
fetched a second time before it counts as damaged: the bytes may have been damaged in transit. If what follows a damaged
batch does not begin with its next offset, the rest of the fetch is dropped, and the next fetch starts behind the batch,
at a boundary that the broker knows. The offsets of a damaged batch are those in its header if nothing contradicts them.
Otherwise fewer are assumed, at least one: too few cost another fetch, too many would cost records.

**Truncation (KIP-320), as kafka-python 3.0.12 does it.** A position has the leader epoch of the record before it. When
the cluster's epoch becomes newer, or a fetch (version 12) says that the logs diverge, the fetcher asks the leader in
the background. If the log ends before the position and ``auto_offset_reset`` is ``none``, a *later* ``poll`` raises
``LogTruncationError``, before it returns any record. Its ``divergent_offsets`` has ``{TopicPartition:
OffsetAndMetadata(end offset, "", end epoch) or None}``; None: the leader does not know the epoch, so the divergence
point is unknown.

It is raised once; then the partition can be fetched again at the *old* position, and an older broker sends whatever
replaced the lost records. So seek at once, with :func:`seek`: ``KafkaConsumer.seek`` takes no epoch, and a position
without one is not validated. (kafka-python forgets the epoch after an empty fetch; ``install`` keeps it.)
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import kafka
from kafka import KafkaConsumer, OffsetAndMetadata, TopicPartition
from kafka.consumer.fetcher import CompletedFetch, ConsumerRecord, Fetcher
from kafka.consumer.subscription_state import SubscriptionState
from kafka.errors import CorruptRecordError, LogTruncationError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import calc_crc32c

from core.errors import ConfigError
from streams.kafka.record_batches import (
    INT64_MAX,
    Corrupt,
    DamagedBatch,
    TolerantBatch,
    most_records,
)

__all__ = ["MAX_BATCH_BYTES", "Corrupt", "install", "seek", "truncations"]

#: Limit on a compressed batch's expanded size: the largest record that Ratchet reads.
MAX_BATCH_BYTES = 64 * 1024 * 1024


def install(consumer: KafkaConsumer, max_batch_bytes: int = MAX_BATCH_BYTES) -> None:
    """Make ``poll`` of this consumer return a ``Corrupt`` for each unreadable offset. Batches that expand to more than
    ``max_batch_bytes`` are not read. Raises ConfigError if the installed kafka-python is built differently, or the
    consumer has deserializers (which would get None for corrupt records)."""
    check_library()
    for name in ("key_deserializer", "value_deserializer"):
        if consumer.config[name] is not None:
            raise ConfigError(f"the consumer has a {name}.", "Decode what `poll` returns instead.")
    fetcher = consumer._fetcher
    fetcher.PartitionRecords = TolerantRecords
    fetcher._parse_fetched_data = partial(_parse, fetcher, fetcher._parse_fetched_data, max_batch_bytes, Suspects())


def complete_joins(consumer: KafkaConsumer) -> None:
    """Make a consumer complete each join that it has started. kafka-python 3.0.12 forgets a join that ``poll`` leaves
    between JoinGroup and SyncGroup: it no longer sees a need to join, and its member stays without partitions
    (tests/outside/kafka/kafka_python_report.md). Raises ConfigError if the installed kafka-python is built differently.
    """
    coordinator = consumer._coordinator
    if not hasattr(coordinator, "_join_task"):
        _reject(f"{type(coordinator).__qualname__}._join_task")
    needed = coordinator.need_rejoin
    coordinator.need_rejoin = lambda: coordinator._join_task is not None or needed()


def make_no_topics(consumer: KafkaConsumer) -> None:
    """Keep a consumer's metadata requests from recreating a lost topic with the broker's default partitions.
    kafka-python 3.0 accepts this consumer option but does not pass it on."""
    consumer._client.cluster.config["allow_auto_create_topics"] = False


def expect_partitions(consumer: KafkaConsumer, topic: str, count: int) -> None:
    """Make a consumer that knows fewer partitions of a topic refresh now, not after up to five minutes."""
    cluster = consumer._client.cluster
    if count > len(cluster.partitions_for_topic(topic) or ()):
        cluster.request_update()


class TolerantRecords(Fetcher.PartitionRecords):  # type: ignore[misc]
    #: Set before the first record is read.
    batches: FetchedBatches
    #: The newest leader epoch reported by the cluster, or -1. A batch's own epoch is not covered by its checksum.
    newest_epoch = -1
    _leader_epoch = -1
    next_fetch_offset: int

    @property
    def leader_epoch(self) -> int:
        """Leader epoch of the last batch, or of the position before it."""
        return self._leader_epoch

    @leader_epoch.setter
    def leader_epoch(self, epoch: int) -> None:
        if epoch >= 0 and (epoch <= self.newest_epoch or self.newest_epoch < 0):
            self._leader_epoch = epoch

    def _unpack_records(self, tp: TopicPartition, records: Any, *deserializers: Any) -> Iterator[Any]:
        try:
            for record in super()._unpack_records(tp, self.batches, *deserializers):
                corrupt = record.checksum
                yield replace(corrupt, leader_epoch=record.leader_epoch) if isinstance(corrupt, Corrupt) else record
        except Exception:
            self.drain()  # or the next poll would read from an exhausted iterator, for ever
            raise
        self.next_fetch_offset = max(self.next_fetch_offset, self.fetch_offset)


def _parse(
    fetcher: Fetcher,
    library: Callable[[CompletedFetch], TolerantRecords | None],
    limit: int,
    suspects: Suspects,
    completed: CompletedFetch,
) -> TolerantRecords | None:
    """Let kafka-python check the response, then give it batches that do not raise."""
    response, partition = completed.partition_data, completed.topic_partition
    data, response.records = response.records or b"", b""  # kafka-python would raise for a truncated batch
    records = library(completed)
    if records is not None:
        epoch = fetcher._manager.cluster.leader_epoch_for_partition(partition)
        records.newest_epoch = -1 if epoch is None else epoch
        records.leader_epoch = fetcher._subscriptions.assignment[partition].position.leader_epoch
        end = response.high_watermark
        records.batches = FetchedBatches(data, partition, completed.fetched_offset, end, limit, suspects)
    return records


def truncations(error: LogTruncationError) -> dict[int, int | None]:
    """Partitions whose log was truncated before the read position, with the first lost offset; None if it is
    unknown."""
    divergences = error.divergent_offsets
    return {
        partition.partition: None if divergence is None else divergence.offset
        for partition, divergence in divergences.items()
    }


def seek(consumer: KafkaConsumer, partition: TopicPartition, offset: int, leader_epoch: int = -1) -> None:
    """Continue at ``offset``. Raises ValueError if the partition is not assigned. With the ``leader_epoch`` of the
    record before it, a truncation is noticed before the first fetch too."""
    consumer.seek(partition, offset)
    if leader_epoch >= 0:
        consumer._subscription.seek(partition, OffsetAndMetadata(offset, "", leader_epoch))


def position(consumer: KafkaConsumer, partition: TopicPartition) -> OffsetAndMetadata | None:
    """The offset of the next fetch, after everything that ``poll`` returned or skipped, with the leader epoch of the
    record before it. None if there is none, or the partition is not assigned."""
    state = consumer._subscription.assignment.get(partition)
    return None if state is None else state.position


def check_library() -> None:
    """Raise ConfigError if kafka-python lacks the internals that this module relies on."""
    relied_on: dict[Any, tuple[str, ...]] = {
        Fetcher: ("_parse_fetched_data",),
        Fetcher.PartitionRecords: ("_unpack_records", "drain"),
        DefaultRecordBatch: ("_maybe_uncompress", "_read_msg", "_buffer", "_pos", "_num_records", "_next_record_index"),
        ConsumerRecord: ("checksum", "leader_epoch"),
        CompletedFetch: ("topic_partition", "fetched_offset", "partition_data"),
        SubscriptionState: ("seek",),
    }
    for owner, names in relied_on.items():
        for name in names:
            if not hasattr(owner, name):
                _reject(f"{owner.__qualname__}.{name}")


def _reject(what: str) -> None:
    raise ConfigError(
        f"kafka-python {kafka.__version__} has no {what}, which stepping over corrupt records relies on.",
        "Install the version that Ratchet was tested with: pip install 'kafka-python==3.0.12'.",
    )


HEADER = DefaultRecordBatch.HEADER_STRUCT
#: Base offset and length, which the length does not count.
OVERHEAD = 12
MAGIC_AT, MAGIC = 16, 2
ATTRIBUTES_AT = 21
CRC_AT = 17
LAST_DELTA_AT, COUNT_AT = 23, 57
#: Field index.
PRODUCER = 9
COMPRESSION = 0x07
#: After this many fetches of a position, its bytes count as damaged in the log even if they differ each time.
MAX_FETCHES = 3


class Unreliable(Exception):
    """A batch that cannot be trusted; the message is the reason."""


class UnreadableMarker(Unreliable):
    """A damaged end-of-transaction marker. Its checksum is right, so it was written like this."""


class Suspects:
    """Damage in the last fetch of each partition, to tell damage in the log from damage in transit."""

    def __init__(self) -> None:
        self._seen: dict[TopicPartition, tuple[int, int, set[int]]] = {}

    def confirmed(self, partition: TopicPartition, position: int, view: memoryview) -> bool:
        """True if the previous fetch brought the same bytes, or several fetches brought other damaged ones."""
        last_position, fetches, digests = self._seen.get(partition, (-1, 0, set()))
        return zlib.crc32(view) in digests or (last_position == position and fetches >= MAX_FETCHES - 1)

    def put(self, partition: TopicPartition, position: int, views: Iterable[memoryview]) -> None:
        last_position, fetches, _ = self._seen.get(partition, (-1, 0, set()))
        count = fetches + 1 if last_position == position else 1
        self._seen[partition] = position, count, {zlib.crc32(each) for each in views}


class FetchedBatches:
    """Iterates like ``kafka.record.MemoryRecords``, over batches that never raise."""

    def __init__(
        self, data: bytes, partition: TopicPartition, position: int, end: int, limit: int, suspects: Suspects
    ) -> None:
        """``data``: the broker's bytes for ``partition`` at offset ``position``. ``end``: the high watermark, -1 if
        unknown. ``limit``: largest expanded size of a batch."""
        self.data = memoryview(data)
        self.partition = partition
        self.position = position
        self.end = end if end >= 0 else INT64_MAX
        self.limit = limit
        self.suspects = suspects
        self._at = 0
        self._first = True
        self._stopped = False

    def next_batch(self) -> Any:
        """The next batch, or None at the end. Raises CorruptRecordError if the fetch is damaged, and the log ends at
        its position."""
        while not self._stopped and self._at < len(self.data):
            view = self._frame(self._at)
            if view is None and not self._first:
                break  # truncated at the fetch size limit: the next fetch has it whole
            try:
                if view is None:
                    raise Unreliable("its length does not fit what was fetched")
                batch, last = self._open(view)
            except Unreliable as problem:
                return self._damaged(self.data[self._at :] if view is None else view, problem)
            self._at += len(view)
            if last < self.position:
                continue  # a batch that ends before the position, which a broker may send first
            self.position = last + 1
            self._first = False
            return batch
        self._stopped = True
        return None

    def _frame(self, start: int) -> memoryview | None:
        """The bytes of the batch at ``start``; None if incomplete."""
        if len(self.data) - start < OVERHEAD:
            return None
        (length,) = struct.unpack_from(">i", self.data, start + 8)
        stop = start + OVERHEAD + length
        return self.data[start:stop] if length >= 0 and stop <= len(self.data) else None

    def _open(self, view: memoryview) -> tuple[Any, int]:
        """The batch and its last offset. Raises Unreliable."""
        base, last = checked(view)
        if last < self.position or (base < self.position and not self._first):
            follows = self._following(len(view))
            if self._first and follows is not None and follows[0] <= self.position:
                return None, last
            raise Unreliable(f"its offsets {base} to {last} were there before")
        if base > self.position:
            follows = self._following(len(view))
            if last >= self.end or (follows is not None and follows[0] <= last):
                raise Unreliable(f"its offsets {base} to {last} do not fit the log, which ends at {self.end}")
        batch = TolerantBatch(view, self.partition, self.position, self.limit)
        if batch.unreadable_control:
            raise UnreadableMarker("it should end a transaction, and has no record that says which way")
        return batch, last

    def _following(self, size: int) -> tuple[int, int] | None:
        """First and last offset of the batch after ``size`` bytes, if it is intact."""
        view = self._frame(self._at + size)
        if view is None:
            return None
        try:
            return checked(view)
        except Unreliable:
            return None

    def _damaged(self, view: memoryview, problem: Unreliable) -> DamagedBatch | None:
        """Handle bytes that cannot be trusted: None at first, then a batch of corrupt records."""
        detail = f"a batch of {len(view)} bytes at offset {self.position} cannot be read: {problem}"
        if self.end <= self.position:
            raise CorruptRecordError(f"{detail}, and the log of {self.partition} ends at {self.end}")
        written = isinstance(problem, UnreadableMarker)
        if not written and not self.suspects.confirmed(self.partition, self.position, view):
            self._stopped = True
            self.suspects.put(self.partition, self.position, [view, *self._damage_behind(len(view))])
            return None
        offsets = self._damaged_offsets(view)
        # After a lost marker, only a new fetch knows which of a producer's records were aborted.
        ends = written and HEADER.unpack_from(view)[PRODUCER] >= 0
        self._at += len(view)
        follows = self._frame(self._at)
        self._stopped = ends or follows is None or struct.unpack_from(">q", follows) != (offsets.stop,)
        self.position = offsets.stop
        self._first = False
        return DamagedBatch(self.partition, offsets, detail, view)

    def _damage_behind(self, size: int) -> Iterator[memoryview]:
        """Damaged batches after ``size`` bytes, so that a single further fetch confirms all of them."""
        start = self._at + size
        while (view := self._frame(start)) is not None:
            try:
                checked(view)
            except Unreliable:
                yield view
            start += len(view)

    def _damaged_offsets(self, view: memoryview) -> range:
        follows = self._following(len(view))
        limit = self.end if follows is None or follows[0] <= self.position else min(self.end, follows[0])
        claimed = self._claimed(view, limit)
        if claimed is not None:
            first, stop = claimed
        else:
            first = self.position
            stop = limit if limit < self.end else first + 1
        compressed = len(view) > ATTRIBUTES_AT + 1 and bool(view[ATTRIBUTES_AT + 1] & COMPRESSION)
        most = most_records(len(view), compressed, self.limit)
        return range(first, max(first + 1, min(stop, limit, first + most)))

    def _claimed(self, view: memoryview, limit: int) -> tuple[int, int] | None:
        """The offsets [first, stop) in the header, if its fields agree with each other and with the fetch."""
        if len(view) < HEADER.size:
            return None
        (base,) = struct.unpack_from(">q", view)
        delta, count = _counts(view)
        if delta < 0 or count != delta + 1:
            return None
        if self.position <= base < limit:
            return base, base + count
        if self._first and base < self.position <= base + delta:
            return self.position, base + count
        return None if self._first else (self.position, self.position + count)


def checked(view: memoryview) -> tuple[int, int]:
    """First and last offset of a batch with a known format and a correct checksum. Raises Unreliable."""
    if len(view) <= MAGIC_AT:
        raise Unreliable("it is too short")
    if (magic := view[MAGIC_AT]) != MAGIC:
        old = ", of Kafka before 0.11" if magic < MAGIC else ""
        raise Unreliable(f"its format has number {magic}{old}")
    if len(view) < HEADER.size:
        raise Unreliable("it is too short")
    (crc,) = struct.unpack_from(">I", view, CRC_AT)
    (base,) = struct.unpack_from(">q", view)
    if crc != calc_crc32c(view[ATTRIBUTES_AT:]):
        raise Unreliable("its checksum is wrong")
    delta, count = _counts(view)
    if not 0 <= base <= INT64_MAX - delta or delta < 0 or count < 0:
        raise Unreliable(f"it has {count} records of offsets {base} to {base + delta}")
    return base, base + delta


def _counts(view: memoryview) -> tuple[int, int]:
    (delta,) = struct.unpack_from(">i", view, LAST_DELTA_AT)
    (count,) = struct.unpack_from(">i", view, COUNT_AT)
    return delta, count
