"""Finding the record batches in the bytes of one fetch, and stepping over those that are damaged.

What the fields in front of a batch say is not covered by its checksum where it matters most (its offset and its
length), so they are believed only where they agree with the fetch: with the position that was asked for, the batch that
follows, the end of the log. A batch that does not is read a second time before it counts as damaged: the log may be
sound, and the bytes have been damaged on their way. Where what follows a damaged batch does not begin with its next
offset, nothing else of the fetch is read, and the next one starts behind it, at a boundary that the broker knows.

The offsets of a damaged batch are those that its header names, where the header contradicts nothing. Otherwise there
are fewer of them, at least one, and the next fetch finds the rest: too few cost a fetch more, too many would cost
records.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from kafka import TopicPartition
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import calc_crc32, calc_crc32c

from streams.record_batches import (
    INT64_MAX,
    MIN_LEGACY_BYTES,
    DamagedBatch,
    TolerantBatch,
    TolerantLegacyBatch,
    most_records,
)

HEADER = DefaultRecordBatch.HEADER_STRUCT
#: Base offset and length: what is in front of the bytes that the length counts.
OVERHEAD = 12
MAGIC_AT = 16
ATTRIBUTES_AT = 21
#: Of magic 0, 1 and 2.
CRC_AT = (12, 12, 17)
LAST_DELTA_AT, COUNT_AT = 23, 57
#: Index of the field.
PRODUCER = 9
COMPRESSION = 0x07
#: A position is fetched no more often than this before its bytes count as damaged in the log, if they differ each time.
MAX_FETCHES = 3


class Unreliable(Exception):
    """A batch that cannot be trusted; the message says why."""


class UnreadableMarker(Unreliable):
    """A batch that should end a transaction. Its checksum is right, so it was written like this."""


class Suspects:
    """Damage that the last fetch of each partition showed, to be told from damage on the way by the next one."""

    def __init__(self) -> None:
        self._seen: dict[TopicPartition, tuple[int, int, set[int]]] = {}

    def confirmed(self, partition: TopicPartition, position: int, view: memoryview) -> bool:
        """Whether the fetch before this one brought the same bytes, or several fetches other damaged ones."""
        last_position, fetches, digests = self._seen.get(partition, (-1, 0, set()))
        return zlib.crc32(view) in digests or (last_position == position and fetches >= MAX_FETCHES - 1)

    def put(self, partition: TopicPartition, position: int, views: Iterable[memoryview]) -> None:
        """Remember the damaged batches of a fetch that is read no further than ``position``."""
        last_position, fetches, _ = self._seen.get(partition, (-1, 0, set()))
        self._seen[partition] = (
            position,
            fetches + 1 if last_position == position else 1,
            {zlib.crc32(each) for each in views},
        )


class FetchedBatches:
    """Iterates as ``kafka.record.MemoryRecords`` does, over batches that never raise."""

    def __init__(
        self, data: bytes, partition: TopicPartition, position: int, end: int, limit: int, suspects: Suspects
    ) -> None:
        """``data``: what the broker sent for ``partition`` at offset ``position``. ``end``: the high watermark, -1 if
        unknown. ``limit``: most bytes that one batch may expand to."""
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
        """The next batch, or None at the end of what was fetched.

        Raises:
            CorruptRecordError: the fetch is damaged, and the broker says that there is nothing at its position.
        """
        while not self._stopped and self._at < len(self.data):
            view = self._frame(self._at)
            if view is None and not self._first:
                break  # cut off at the most bytes of a fetch: the next one brings it whole
            try:
                if view is None:
                    raise Unreliable("its length does not fit what was fetched")
                batch, last = self._open(view)
            except Unreliable as problem:
                return self._damaged(self.data[self._at :] if view is None else view, problem)
            self._at += len(view)
            if last < self.position:
                continue  # a batch that ends before the position, as a broker may send in front of the right one
            self.position = last + 1
            self._first = False
            return batch
        self._stopped = True
        return None

    def _frame(self, start: int) -> memoryview | None:
        """The bytes of the batch at ``start``, or None if they are not all there."""
        if len(self.data) - start < OVERHEAD:
            return None
        (length,) = struct.unpack_from(">i", self.data, start + 8)
        stop = start + OVERHEAD + length
        return self.data[start:stop] if length >= 0 and stop <= len(self.data) else None

    def _open(self, view: memoryview) -> tuple[Any, int]:
        """The batch, and its last offset. Raises Unreliable."""
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
        magic = view[MAGIC_AT]
        if magic < 2:
            return TolerantLegacyBatch(view, magic, self.partition, self.position, self.limit), last
        batch = TolerantBatch(view, self.partition, self.position, self.limit)
        if batch.unreadable_control:
            raise UnreadableMarker("it should end a transaction, and has no record that says which way")
        return batch, last

    def _following(self, size: int) -> tuple[int, int] | None:
        """First and last offset of the batch that follows one of so many bytes, if it is sound and of magic 2.

        Of a message set (magic 0 and 1), the last offset alone is known.
        """
        view = self._frame(self._at + size)
        if view is None or len(view) < HEADER.size or view[MAGIC_AT] != 2:
            return None
        try:
            return checked(view)
        except Unreliable:
            return None

    def _damaged(self, view: memoryview, problem: Unreliable) -> DamagedBatch | None:
        """What comes out for bytes that cannot be trusted: None at first, then a batch of corrupt records."""
        detail = f"a batch of {len(view)} bytes at offset {self.position} cannot be read: {problem}"
        if self.end <= self.position:
            raise CorruptRecordError(f"{detail}, and the log of {self.partition} ends at {self.end}")
        written = isinstance(problem, UnreadableMarker)
        if not written and not self.suspects.confirmed(self.partition, self.position, view):
            self._stopped = True
            self.suspects.put(self.partition, self.position, [view, *self._damage_behind(len(view))])
            return None
        offsets = self._damaged_offsets(view)
        # Behind a lost marker, which of a producer's records were taken back is known to a new fetch only.
        ends = written and HEADER.unpack_from(view)[PRODUCER] >= 0
        self._at += len(view)
        self._stopped = ends or self._base_at(self._at) != offsets.stop
        self.position = offsets.stop
        self._first = False
        return DamagedBatch(self.partition, offsets, detail, view)

    def _base_at(self, start: int) -> int | None:
        """What the batch at ``start`` names as its first offset, if it is all there."""
        view = self._frame(start)
        return None if view is None else int(struct.unpack_from(">q", view)[0])

    def _damage_behind(self, size: int) -> Iterator[memoryview]:
        """Damaged batches behind one of so many bytes, so that one more fetch is enough for all of them."""
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
        """The offsets [first, stop) that the header names, if its fields agree with each other and with the fetch."""
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
    """First and last offset of a batch whose format is known and whose checksum is right.

    Raises:
        Unreliable: it is not such a batch.
    """
    if len(view) < MIN_LEGACY_BYTES:
        raise Unreliable("it is too short")
    magic = view[MAGIC_AT]
    if magic > 2:
        raise Unreliable(f"its format has number {magic}")
    if len(view) < (MIN_LEGACY_BYTES, MIN_LEGACY_BYTES + 8, HEADER.size)[magic]:
        raise Unreliable("it is too short")
    (crc,) = struct.unpack_from(">I", view, CRC_AT[magic])
    (base,) = struct.unpack_from(">q", view)
    if crc != (calc_crc32c(view[ATTRIBUTES_AT:]) if magic == 2 else calc_crc32(view[MAGIC_AT:])):
        raise Unreliable("its checksum is wrong")
    delta, count = _counts(view) if magic == 2 else (0, 1)
    if not 0 <= base <= INT64_MAX - delta or delta < 0 or count < 0:
        raise Unreliable(f"it has {count} records of offsets {base} to {base + delta}")
    return base, base + delta


def _counts(view: memoryview) -> tuple[int, int]:
    """Last offset less base offset, and number of records, as a batch of magic 2 names them."""
    (delta,) = struct.unpack_from(">i", view, LAST_DELTA_AT)
    (count,) = struct.unpack_from(">i", view, COUNT_AT)
    return delta, count
