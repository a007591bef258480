"""Record batches byte by byte, which no client library would build, and a producer for them."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kafka import codec as kafka_codec
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.util import calc_crc32c, encode_varint

HEADER = DefaultRecordBatch.HEADER_STRUCT
CODECS = ("none", "gzip", "snappy", "lz4", "zstd")
_ENCODERS: list[Any] = [bytes, *(getattr(kafka_codec, f"{name}_encode") for name in CODECS[1:])]


@dataclass(frozen=True)
class RawMessage:
    """The contents of a record; header names are bytes, which need not be UTF-8."""

    value: bytes | None
    key: bytes | None = None
    headers: Sequence[tuple[bytes, bytes | None]] = ()
    timestamp: int = 1_700_000_000_000


@dataclass(frozen=True)
class RawBatch:
    messages: Sequence[RawMessage]
    codec: int = 0
    base: int = 0
    epoch: int = 0
    attributes: int = 0
    producer: int = -1
    extra: dict[str, int] = field(default_factory=dict)

    def body(self) -> bytes:
        first = self.messages[0].timestamp if self.messages else 0
        return b"".join(encode_record(each, n, each.timestamp - first) for n, each in enumerate(self.messages))

    def encode(self, body: bytes | None = None) -> bytearray:
        """The batch, with a correct checksum. ``body``: replaces the records, uncompressed."""
        times = [each.timestamp for each in self.messages] or [0]
        batch = bytearray(HEADER.size) + _ENCODERS[self.codec](self.body() if body is None else body)
        count, known = len(self.messages), 0 if self.producer >= 0 else -1
        HEADER.pack_into(
            batch, 0, self.base, len(batch) - 12, self.epoch, 2, 0, self.attributes | self.codec,
            self.extra.get("delta", count - 1), times[0], max(times), self.producer, known, known,
            self.extra.get("count", count),
        )  # fmt: skip
        return seal(batch)


def seal(batch: bytearray) -> bytearray:
    struct.pack_into(">I", batch, 17, calc_crc32c(memoryview(batch)[21:]))
    return batch


def encode_record(message: RawMessage, offset_delta: int, timestamp_delta: int) -> bytes:
    out = bytearray(b"\x00")
    _varints(out, (timestamp_delta + 2**63) % 2**64 - 2**63, offset_delta)  # as 64 bits hold it
    for each in (message.key, message.value):
        _nullable(out, each)
    _varints(out, len(message.headers))
    for name, value in message.headers:
        _nullable(out, name)
        _nullable(out, value)
    size = bytearray()
    _varints(size, len(out))
    return bytes(size + out)


def _varints(out: bytearray, *numbers: int) -> None:
    for number in numbers:
        encode_varint(number, out.append)


def _nullable(out: bytearray, data: bytes | None) -> None:
    _varints(out, -1 if data is None else len(data))
    out += data or b""


NO_LEADER = 6
"""NOT_LEADER_OR_FOLLOWER: Apache Kafka elects a new partition's leader after the topic is there."""
NO_LEADER_TRIES = 100


class RawProducer:
    """Sends batches unchanged. A context manager; one connection."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=30)
        self._stream = self._socket.makefile("rb")

    def send(self, topic: str, partition: int, batches: bytes) -> tuple[int, int]:
        """Error code and first offset, once there is a leader. Raises ConnectionError when the broker hangs up."""
        code, offset = NO_LEADER, -1
        for _ in range(NO_LEADER_TRIES):
            code, offset = self._sent(topic, partition, batches)
            if code != NO_LEADER:
                break
            time.sleep(0.1)
        return code, offset

    def _sent(self, topic: str, partition: int, batches: bytes) -> tuple[int, int]:
        client, name = b"raw", topic.encode()
        request = struct.pack(">hhih", 0, 7, 1, len(client)) + client  # Produce, version 7
        request += struct.pack(">hhiih", -1, 1, 30_000, 1, len(name)) + name
        request += struct.pack(">iii", 1, partition, len(batches)) + batches
        self._socket.sendall(struct.pack(">i", len(request)) + request)
        size = self._stream.read(4)
        if len(size) < 4:
            raise ConnectionError("the broker hung up")
        reply = self._stream.read(struct.unpack(">i", size)[0])
        _, code, offset = struct.unpack_from(">ihq", reply, 4 + 4 + 2 + len(name) + 4)
        return code, offset

    def __enter__(self) -> RawProducer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()
