"""Ways in which a record can be wrong: in its value, key, headers and time, and in the batch that it is packed in.

Each takes a random generator, so that the same seed makes the same bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from random import Random

from streams.kafka.record_batches import MAX_HEADERS
from streams.kafka.tolerant_fetch import MAX_BATCH_BYTES
from tests.support.raw_batches import RawBatch, RawMessage, seal

MILLIS = 1_700_000_000_000
#: CreateTime as producers send it: right, unknown, zero, before 1970, in microseconds and nanoseconds, the largest.
TIMES = (
    MILLIS,
    -1,
    0,
    -62_135_596_800_000,
    -(2**62),
    1,
    MILLIS * 1_000,
    MILLIS * 1_000_000,
    253_402_300_800_000,
    2**63 - 1,
)

Mutation = Callable[[RawMessage, Random], RawMessage]
Damage = Callable[[RawBatch, Random], bytearray]

_ODD_JSON: tuple[bytes, ...] = (
    b"", b"null", b"[]", b"{}", b"1e999", b"NaN", b'{"image": NaN}', b'"\\ud800"', b"\xef\xbb\xbf{}", b"{" * 200,
    b"[" * 5_000, b'{"a":' * 2_000, "{}".encode("utf-16"), b'{"text": "\\ud800", "image": "AAAA"}', b'{"image": 1}',
    b'{"image": "data:,x", "text": "a"}', b'{"image_uri": "file:///etc/passwd", "text": "a"}', b'{"tags": {}}',
    b'{"specversion": "1.0", "data": 7}', b'{"specversion": [], "type": {}}', b'{"image": "\\u0000", "text": "a"}',
    b'{"schema": {"type": "struct"}, "payload": null}', b"\x00\x00\x00\x00\x01{}", b"\x00\x00\x00\x00\x01", b"\x00" * 5,
    b'{"time": "9999-12-31T23:59:59+99:00", "text": "a", "image": "AAAA"}', b'{"text": ' + b"9" * 5_000 + b"}",
)  # fmt: skip


def _flip(data: bytes, chance: Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 20))):
        if out:
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def flipped_value(message: RawMessage, chance: Random) -> RawMessage:
    """Bits of the value are changed."""
    return replace(message, value=_flip(message.value or b"", chance))


def cut_value(message: RawMessage, chance: Random) -> RawMessage:
    """The value ends early, or goes on."""
    value, more = message.value or b"", chance.randbytes(chance.choice((0, 0, 9)))
    return replace(message, value=value[: chance.randrange(len(value) + 1)] + more)


def random_value(message: RawMessage, chance: Random) -> RawMessage:
    """The value is random bytes, empty or none."""
    return replace(message, value=chance.choice((None, b"", chance.randbytes(chance.randrange(300)))))


def odd_json(message: RawMessage, chance: Random) -> RawMessage:
    """The value is JSON that is no record, or nearly JSON."""
    return replace(message, value=chance.choice(_ODD_JSON), headers=chance.choice(((), message.headers)))


def odd_fields(message: RawMessage, chance: Random) -> RawMessage:
    """A record in JSON with fields of wrong types and sizes."""
    odd: tuple[object, ...] = (None, 7, -1.5, True, [], {}, [[]], "", "x" * 3_000, "\x00", "é" * 300)
    odd += ({"a": {"b": []}}, 10**400)
    names = ("text", "image", "image_uri", "time", "tags", "source", "schema", "question", "payload", "key", "zzz")
    fields = {name: chance.choice(odd) for name in chance.sample(names, chance.randrange(1, len(names)))}
    return replace(message, value=json.dumps(fields).encode(), headers=())


def odd_key(message: RawMessage, chance: Random) -> RawMessage:
    """The key is none, empty, long or not text."""
    return replace(message, key=chance.choice((None, b"", b"\xff\xfe\x00", b"k" * 5_000, chance.randbytes(40))))


def odd_headers(message: RawMessage, chance: Random) -> RawMessage:
    """Headers that are long, repeated, empty, without a value, with a value that is not UTF-8 or of the wrong type."""
    odd: list[tuple[bytes, bytes | None]] = [
        (b"", b""), (b"content-type", b"application/cloudevents+json"), (b"content-type", b"\xff"), (b"x", None),
        (b"ratchet_text", None), (b"ratchet_text", b"\xff"), (b"ratchet_text", b"t" * 20_000), (b"ratchet_no", b"x"),
        (b"ratchet_time", b"yesterday"), (b"ratchet_tags", b";" * 500), (b"RATCHET_TEXT", b"upper"), (b"ce_time", b"0"),
        (b"ce_specversion", b"9"), (b"ce_specversion", None), (b"n" * 5_000, b"x"), (b"ratchet_image", b"x"),
        ("ratchet_текст".encode(), b"x"), (b"a\x00b", b"\x00"),
    ]  # fmt: skip
    more = [chance.choice(odd) for _ in range(chance.choice((1, 1, 2, 5, 300)))]
    return replace(message, headers=[*message.headers, *more])


def odd_time(message: RawMessage, chance: Random) -> RawMessage:
    """CreateTime in a unit of its own."""
    return replace(message, timestamp=chance.choice(TIMES))


def header_name_not_utf8(message: RawMessage, chance: Random) -> RawMessage:
    """kafka-python cannot read it."""
    name = chance.choice((b"\xff\xfe", b"ratchet_\xe9t\xe9", b"\xc3", b"\xed\xa0\x80"))
    return replace(message, headers=[*message.headers, (name, b"x"), (b"after", None)])


def too_many_headers(message: RawMessage, chance: Random) -> RawMessage:
    """More headers than are read."""
    return replace(message, headers=[(b"", b"")] * (MAX_HEADERS + 1))


#: What may come out of these: a sample, a duplicate or a refusal.
MUTATIONS: tuple[Mutation, ...] = (
    flipped_value, flipped_value, cut_value, random_value, odd_json, odd_fields, odd_key, odd_headers, odd_time,
)  # fmt: skip
#: These cannot be read.
UNREADABLE: tuple[Mutation, ...] = (*[header_name_not_utf8] * 9, too_many_headers)


def wrong_checksum(batch: RawBatch, chance: Random) -> bytearray:
    """A bit behind the checksum is changed; not of the counts, which a careless broker numbers its offsets by."""
    encoded = batch.encode()
    encoded[chance.choice((21, 22, *range(27, 57), *range(61, len(encoded))))] ^= 1 << chance.randrange(8)
    return encoded


def wrong_magic(batch: RawBatch, chance: Random) -> bytearray:
    """A format that there is not, or another than it has."""
    encoded = batch.encode()
    encoded[16] = chance.choice((0, 1, 3, 9, 127, 128, 255))
    return encoded


def wrong_payload(batch: RawBatch, chance: Random) -> bytearray:
    """Compressed records that do not expand."""
    encoded = replace(batch, codec=chance.randrange(1, 5)).encode()
    encoded[61:] = bytes(len(encoded) - 61) if chance.random() < 0.3 else chance.randbytes(len(encoded) - 61)
    return seal(encoded)


def no_marker(batch: RawBatch, chance: Random) -> bytearray:
    """A batch that should end a transaction, and has nothing that says which way."""
    first, *rest = batch.messages
    return replace(
        batch, messages=[replace(first, key=b"none"[: chance.randrange(4)]), *rest], attributes=0x20
    ).encode()


def expands_too_far(batch: RawBatch, chance: Random) -> bytearray:
    """A few KiB that are 64 MiB; of as many records as the batch has."""
    bomb = RawMessage(bytes(MAX_BATCH_BYTES + 1))
    return replace(batch, messages=[bomb, *batch.messages[1:]], codec=4).encode()


def flipped_body(batch: RawBatch, chance: Random) -> bytearray:
    """Bits of the records are changed, and the checksum is right."""
    return RawBatch.encode(batch, _flip(batch.body(), chance))


def wrong_count(batch: RawBatch, chance: Random) -> bytearray:
    """More or fewer records than are there."""
    encoded = batch.encode()
    struct.pack_into(">i", encoded, 57, chance.choice((0, len(batch.messages) - 1, len(batch.messages) + 1, 2**31 - 1)))
    return seal(encoded)


def stamped_by_broker(batch: RawBatch, chance: Random) -> bytearray:
    """LogAppendTime, which producers do not set."""
    return replace(batch, attributes=0x08).encode()


#: No record of these can be read.
DAMAGES: tuple[Damage, ...] = (wrong_checksum, wrong_magic, wrong_payload, no_marker)
#: Some of these may be read.
DOUBTS: tuple[Damage, ...] = (flipped_body, flipped_body, wrong_count, stamped_by_broker)
