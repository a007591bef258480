"""Record batches of a Kafka log, parsed so that no bytes raise an exception. Unreadable records carry a ``Corrupt`` in
kafka-python's checksum field, so that they pass through its own code like any other.
:mod:`streams.kafka.tolerant_fetch` finds the batches in a fetch and decides which can be trusted.

kafka-python expands a compressed batch whole: 64 KiB of gzip can be 64 MiB of zeros. The decoders here use the
incremental interface of the same libraries, and stop as soon as the output exceeds a limit.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import snappy
import zstandard
from kafka import TopicPartition
from kafka.record.default_records import DefaultRecord, DefaultRecordBatch
from kafka.record.util import decode_varint
from lz4.frame import LZ4FrameDecompressor

#: Most unreadable bytes kept with a ``Corrupt``.
MAX_RAW_BYTES = 1 << 20
#: Most headers per record: a batch of 64 MiB has room for 33 million empty ones, for which Python would need 4 GB.
MAX_HEADERS = 10_000
#: The smallest record: one byte each for length, attributes, time, offset, key, value and headers.
MIN_RECORD_BYTES = 7
#: Deflate, which expands most of the Java clients' codecs, makes at most 1,032 bytes of one.
MAX_RATIO = 1032
INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Corrupt:
    """An offset whose record cannot be read; ``poll`` returns it in place of the record."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    """Milliseconds since 1970; -1 if unknown."""
    detail: str
    raw: bytes | None
    """At most 1 MiB of the record's bytes, or of its batch's if the record cannot be separated. Of consecutive offsets
    that share their bytes, only the first has them."""
    leader_epoch: int = -1


def record_head(buffer: bytearray, start: int) -> tuple[int, int, int, int]:
    """End, time delta, offset delta and number of headers of the record at ``start``. Raises ValueError or IndexError
    if there is none."""
    length, position = decode_varint(buffer, start)
    end = position + length
    if length < MIN_RECORD_BYTES - 1 or end > len(buffer):
        raise ValueError(f"a record of {length} bytes where {len(buffer) - position} are left")
    _, position = decode_varint(buffer, position)
    timestamp_delta, position = decode_varint(buffer, position)
    offset_delta, position = decode_varint(buffer, position)
    for _ in ("key", "value"):
        size, position = decode_varint(buffer, position)
        position += max(0, size)
    headers, _ = decode_varint(buffer, position)
    return end, timestamp_delta, offset_delta, headers


def most_records(size: int, compressed: bool, limit: int) -> int:
    """Most records that a batch of ``size`` bytes can hold; at least one."""
    return max(1, (min(size * MAX_RATIO, limit) if compressed else size) // MIN_RECORD_BYTES)


class CorruptRecord(DefaultRecord):  # type: ignore[misc]
    __slots__ = ("checksum",)

    def __init__(self, corrupt: Corrupt) -> None:
        super().__init__(0, corrupt.offset, corrupt.timestamp, 0, None, None, [])
        self.checksum = corrupt


def corrupt_records(
    partition: TopicPartition, offsets: range, detail: str, raw: Any, timestamp: int = -1
) -> Iterator[CorruptRecord]:
    known = timestamp if -1 <= timestamp <= INT64_MAX else -1
    for offset in offsets:
        excerpt = bytes(raw[:MAX_RAW_BYTES]) if offset == offsets.start else None
        yield CorruptRecord(Corrupt(partition.topic, partition.partition, offset, known, detail, excerpt))


class DamagedBatch:
    """Bytes with a wrong checksum or framing: one corrupt record for each of ``offsets``."""

    #: Not a real format: kafka-python then takes offset and position from the records.
    magic = None

    def __init__(self, partition: TopicPartition, offsets: range, detail: str, raw: memoryview) -> None:
        self.base_offset = offsets.start
        self._records = corrupt_records(partition, offsets, detail, raw)

    def validate_crc(self) -> bool:
        return True

    def __iter__(self) -> Iterator[CorruptRecord]:
        return self._records


class TolerantBatch(DefaultRecordBatch):  # type: ignore[misc]
    """A batch of Kafka 0.11 or later (magic 2) with a correct checksum. A record with invalid UTF-8 in its header
    names, or with too many headers, is corrupt alone. After any other fault nothing that follows can be parsed, and
    each offset up to the batch's last is corrupt; but no more of them than the bytes can hold records: a producer could
    claim two billion."""

    compression_type: int
    _buffer: bytearray
    _pos: int
    _decompressed: bool

    def __init__(self, view: memoryview, partition: TopicPartition, start: int, limit: int) -> None:
        """``start``: the first offset wanted. ``limit``: largest expanded size of the records."""
        super().__init__(view)
        self._source = view
        self._partition = partition
        self._from = start
        self._limit = limit

    def validate_crc(self) -> bool:
        return True

    @property
    def is_control_batch(self) -> bool:
        """True for an end-of-transaction marker; False if compaction removed the marker and left the batch empty."""
        return bool(super().is_control_batch) and bool(self.records_count)

    @property
    def unreadable_control(self) -> bool:
        if not self.is_control_batch:
            return False
        start = self._pos
        try:
            self._read_msg()
        except Exception:
            return True
        finally:
            self._pos = start
        return False

    def __iter__(self) -> Iterator[Any]:
        expected: int = self.base_offset
        last: int = self.last_offset
        try:
            self._maybe_uncompress()
            while self._next_record_index < self._num_records:
                record = self._next_record(expected)
                yield record
                expected = record.offset + 1
                self._next_record_index += 1
            if self._pos != len(self._buffer):
                raise ValueError(f"{len(self._buffer) - self._pos} bytes after the last record")
            if self._complete and expected <= last:
                raise ValueError("records are missing")
        except MemoryError:
            raise  # a fault of this process, not of the data
        except Exception as error:  # includes whatever a codec's library raises
            cause = (str(error) or type(error).__name__)[:200]
            detail = f"the batch of offsets {self.base_offset} to {last} cannot be read: {cause}"
            first = max(expected, self._from)
            most = most_records(len(self._source), bool(self.compression_type), self._limit)
            left = range(first, min(last + 1, first + most))
            yield from corrupt_records(self._partition, left, detail, self._source, self.max_timestamp)

    def _next_record(self, expected: int) -> Any:
        start = self._pos
        end, timestamp_delta, offset_delta, headers = record_head(self._buffer, start)
        offset = self.base_offset + offset_delta
        if not expected <= offset <= self.last_offset or (self._complete and offset != expected):
            raise ValueError(f"a record of offset {offset} where {expected} is next, {self.last_offset} the last")
        try:
            if headers > MAX_HEADERS:
                raise UnicodeError(f"{headers} headers, more than {MAX_HEADERS}")
            return self._read_msg()
        except UnicodeError as error:
            self._pos = end
            raw = memoryview(self._buffer)[start:end]
            detail = f"a header cannot be read: {error}"
            timestamp = self.first_timestamp + timestamp_delta
            return next(corrupt_records(self._partition, range(offset, offset + 1), detail, raw, timestamp))

    @property
    def _complete(self) -> bool:
        """True if compaction removed no record, so that offsets are consecutive."""
        return bool(self.records_count == self.last_offset_delta + 1)

    def _maybe_uncompress(self) -> None:
        if not self._decompressed and self.compression_type:
            body = memoryview(self._buffer)[self._pos :]
            self._buffer = decompress(self.compression_type, body, self._limit)
            self._pos = 0
        self._decompressed = True


GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
CHUNK = 1 << 20
#: Members of one gzip stream: Kafka's clients write one, and each further one copies what follows it.
MAX_GZIP_MEMBERS = 64
XERIAL_MAGIC = b"\x82SNAPPY\x00"
XERIAL_HEADER_BYTES = 16


class TooLarge(ValueError):
    def __init__(self, limit: int) -> None:
        super().__init__(f"expands to more than {limit} bytes")


def decompress(codec: int, data: memoryview, limit: int) -> bytearray:
    """Expand ``data``. ``codec`` is the low three bits of a batch's attributes. Raises TooLarge if the output exceeds
    ``limit`` bytes, with at most ``limit`` + 1 MiB held in memory; ValueError for an unknown codec; any exception of
    the codec's library for damaged data."""
    decoder = _DECODERS.get(codec)
    if decoder is None:
        raise ValueError(f"compression codec {codec} is not known")
    return decoder(data, limit)


def _gunzip(data: memoryview, limit: int) -> bytearray:
    out = bytearray()
    rest: bytes | memoryview = data
    for _ in range(MAX_GZIP_MEMBERS):
        member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        out += member.decompress(rest, limit - len(out) + 1)
        if len(out) > limit:
            raise TooLarge(limit)
        if not member.eof:
            raise ValueError("the gzip stream ends early")
        rest = member.unused_data.lstrip(b"\x00")
        if not rest:
            return out
    raise ValueError(f"the gzip stream has more than {MAX_GZIP_MEMBERS} members")


def _unsnappy(data: memoryview, limit: int) -> bytearray:
    out = bytearray()
    for block in _snappy_blocks(data):
        if _snappy_length(block) > limit - len(out):
            raise TooLarge(limit)
        out += snappy.decompress(bytes(block))
    return out


def _snappy_blocks(data: memoryview) -> list[memoryview]:
    if len(data) <= XERIAL_HEADER_BYTES or data[: len(XERIAL_MAGIC)] != XERIAL_MAGIC:
        return [data]
    blocks = []
    start = XERIAL_HEADER_BYTES
    while start < len(data):
        (size,) = struct.unpack_from(">i", data, start)
        start += 4
        if not 0 < size <= len(data) - start:
            raise ValueError(f"a snappy block of {size} bytes does not fit the stream")
        blocks.append(data[start : start + size])
        start += size
    return blocks


def _snappy_length(block: memoryview) -> int:
    """A block's claimed expanded size: a little-endian base-128 number at its start."""
    length = 0
    for number, byte in enumerate(block[:5]):
        length |= (byte & 0x7F) << (7 * number)
        if byte < 0x80:
            return length
    raise ValueError("a snappy block has no length")


def _unlz4(data: memoryview, limit: int) -> bytearray:
    frame = LZ4FrameDecompressor()
    out = bytearray(frame.decompress(bytes(data), max_length=CHUNK))
    while not frame.eof and len(out) <= limit:
        before = len(out)
        out += frame.decompress(b"", max_length=CHUNK)
        if len(out) == before and frame.needs_input:
            raise ValueError("the lz4 frame ends early")
    if len(out) > limit:
        raise TooLarge(limit)
    return out


def _unzstd(data: memoryview, limit: int) -> bytearray:
    out = bytearray()
    with zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True) as reader:
        while chunk := reader.read(CHUNK):
            out += chunk
            if len(out) > limit:
                raise TooLarge(limit)
    return out


_DECODERS: dict[int, Callable[[memoryview, int], bytearray]] = {
    GZIP: _gunzip,
    SNAPPY: _unsnappy,
    LZ4: _unlz4,
    ZSTD: _unzstd,
}
