"""Decompression of Kafka record batches that stops at a number of bytes, before memory is filled.

kafka-python expands a batch whole, whatever it expands to: 64 KiB of gzip can be 64 MiB of zeros. These decoders use
the incremental interface of the same libraries, and stop as soon as the output is larger than a limit.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import snappy
import zstandard
from lz4.frame import LZ4FrameDecompressor

GZIP, SNAPPY, LZ4, ZSTD = 1, 2, 3, 4
CHUNK = 1 << 20
#: Members of one gzip stream: Kafka's clients write one, and each further one copies what follows it.
MAX_GZIP_MEMBERS = 64
XERIAL_MAGIC = b"\x82SNAPPY\x00"
XERIAL_HEADER_BYTES = 16


class TooLarge(ValueError):
    """The data expands to more than the limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"expands to more than {limit} bytes")


def decompress(codec: int, data: memoryview, limit: int) -> bytearray:
    """Expand ``data``, compressed with the codec of that number (the low three bits of a batch's attributes).

    Raises:
        TooLarge: it would be more than ``limit`` bytes; no more than ``limit`` + 1 MiB of it was held in memory.
        Exception: whatever the codec's library raises for data that is damaged; ValueError for an unknown codec.
    """
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
    """The blocks of a stream of the Java library xerial; other data is one block."""
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
    """Bytes that a block claims to expand to: a little-endian base-128 number in front of it."""
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
