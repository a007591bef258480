"""Records mutated at every level (value, key, headers, time, batch), mixed with good ones, and the expected result of
each.

>>> sent = publish_mutated(settings.kafka, 20_000, seed=1)  # doctest: +SKIP
>>> set(sent.records) == {(row["partition"], row["offset"]) for row in rows}  # doctest: +SKIP
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal

from core.settings.streams import Kafka
from ratchet_client.encoding import Encoding, encode
from ratchet_client.records import Sample
from streams.kafka.record_batches import MAX_HEADERS
from streams.kafka.tolerant_fetch import MAX_BATCH_BYTES
from tests.support.kafka import picture
from tests.support.raw_batches import RawBatch, RawMessage, RawProducer, seal

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
    return replace(message, value=_flip(message.value or b"", chance))


def cut_value(message: RawMessage, chance: Random) -> RawMessage:
    value, more = message.value or b"", chance.randbytes(chance.choice((0, 0, 9)))
    return replace(message, value=value[: chance.randrange(len(value) + 1)] + more)


def random_value(message: RawMessage, chance: Random) -> RawMessage:
    return replace(message, value=chance.choice((None, b"", chance.randbytes(chance.randrange(300)))))


def odd_json(message: RawMessage, chance: Random) -> RawMessage:
    return replace(message, value=chance.choice(_ODD_JSON), headers=chance.choice(((), message.headers)))


def odd_fields(message: RawMessage, chance: Random) -> RawMessage:
    odd: tuple[object, ...] = (None, 7, -1.5, True, [], {}, [[]], "", "x" * 3_000, "\x00", "é" * 300)
    odd += ({"a": {"b": []}}, 10**400)
    names = ("text", "image", "image_uri", "time", "tags", "source", "schema", "question", "payload", "key", "zzz")
    fields = {name: chance.choice(odd) for name in chance.sample(names, chance.randrange(1, len(names)))}
    return replace(message, value=json.dumps(fields).encode(), headers=())


def odd_key(message: RawMessage, chance: Random) -> RawMessage:
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
    return replace(message, timestamp=chance.choice(TIMES))


def header_name_not_utf8(message: RawMessage, chance: Random) -> RawMessage:
    """kafka-python cannot read it."""
    name = chance.choice((b"\xff\xfe", b"ratchet_\xe9t\xe9", b"\xc3", b"\xed\xa0\x80"))
    return replace(message, headers=[*message.headers, (name, b"x"), (b"after", None)])


def too_many_headers(message: RawMessage, chance: Random) -> RawMessage:
    return replace(message, headers=[(b"", b"")] * (MAX_HEADERS + 1))


#: What may come out of these: a sample, a duplicate or a refusal.
MUTATIONS: tuple[Mutation, ...] = (
    flipped_value, flipped_value, cut_value, random_value, odd_json, odd_fields, odd_key, odd_headers, odd_time,
)  # fmt: skip
#: These cannot be read.
UNREADABLE: tuple[Mutation, ...] = (*[header_name_not_utf8] * 9, too_many_headers)


def wrong_checksum(batch: RawBatch, chance: Random) -> bytearray:
    """Change a bit after the checksum, except in the counts, from which a careless broker numbers its offsets."""
    encoded = batch.encode()
    encoded[chance.choice((21, 22, *range(27, 57), *range(61, len(encoded))))] ^= 1 << chance.randrange(8)
    return encoded


def wrong_magic(batch: RawBatch, chance: Random) -> bytearray:
    """Set an unknown batch format, or another than the batch has."""
    encoded = batch.encode()
    encoded[16] = chance.choice((0, 1, 3, 9, 127, 128, 255))
    return encoded


def wrong_payload(batch: RawBatch, chance: Random) -> bytearray:
    encoded = replace(batch, codec=chance.randrange(1, 5)).encode()
    encoded[61:] = bytes(len(encoded) - 61) if chance.random() < 0.3 else chance.randbytes(len(encoded) - 61)
    return seal(encoded)


def no_marker(batch: RawBatch, chance: Random) -> bytearray:
    """A batch that should end a transaction, without the marker that says which way."""
    first, *rest = batch.messages
    return replace(
        batch, messages=[replace(first, key=b"none"[: chance.randrange(4)]), *rest], attributes=0x20
    ).encode()


def expands_too_far(batch: RawBatch, chance: Random) -> bytearray:
    """A few KiB that expand to 64 MiB, with as many records as the batch has."""
    bomb = RawMessage(bytes(MAX_BATCH_BYTES + 1))
    return replace(batch, messages=[bomb, *batch.messages[1:]], codec=4).encode()


def flipped_body(batch: RawBatch, chance: Random) -> bytearray:
    return RawBatch.encode(batch, _flip(batch.body(), chance))


def wrong_count(batch: RawBatch, chance: Random) -> bytearray:
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


Expected = Literal["valid", "corrupt", "maybe"]
ENCODINGS: tuple[Encoding, ...] = ("json", "raw", "cloudevents", "cloudevents-binary")
#: Pictures of the records that are mutated, all different from those of the good ones.
VICTIMS = 50
FIRST_VICTIM = 10_000_000
#: Batches of 65 MiB: each takes 0.1 s to look at.
MAX_BOMBS = 3


@dataclass(frozen=True)
class RawRecord:
    message: RawMessage
    expected: Expected
    """``valid``: stored as a sample. ``corrupt``: a row of that kind. ``maybe``: one row of any kind."""
    kind: str
    """The mutation, or the encoding of a good record."""
    id: str = ""
    """ID of the sample that a valid record becomes."""


@dataclass
class Sent:
    """The contents of the topic, by partition and offset."""

    topic: str
    records: dict[tuple[int, int], RawRecord] = field(default_factory=dict)
    refused: list[RawRecord] = field(default_factory=list)
    """Records of batches that the broker refused (the embedded one accepts all)."""

    @property
    def valid(self) -> dict[str, tuple[int, int]]:
        return {each.id: at for at, each in self.records.items() if each.expected == "valid"}

    @property
    def corrupt(self) -> set[tuple[int, int]]:
        return {at for at, each in self.records.items() if each.expected == "corrupt"}

    @property
    def kinds(self) -> Counter[str]:
        return Counter(each.kind for each in self.records.values())


def mutated(count: int, seed: int, valid_share: float = 0.25) -> Iterator[RawRecord]:
    """Records that depend only on the seed; about ``valid_share`` of them are good."""
    chance = Random(seed)
    victims = [_message(_sample(FIRST_VICTIM + n, chance), ENCODINGS[n % 4], chance) for n in range(VICTIMS)]
    for number in range(count):
        if chance.random() < valid_share:
            yield _good(seed * 1_000_000 % FIRST_VICTIM + number, chance)
        else:
            yield _mutant(chance.choice(victims), chance)


def publish_mutated(kafka: Kafka, count: int, seed: int, valid_share: float = 0.25) -> Sent:
    """Write them to ``kafka.topic``, in batches of one to eight with all codecs, some of them damaged.

    Good records share batches with mutated ones, but not with damage to the batch.
    """
    chance = Random(seed + 1)
    sent = Sent(kafka.topic)
    bombs = 0
    with RawProducer(kafka.bootstrap.split(",")[0].strip()) as producer:
        for group in _groups(mutated(count, seed, valid_share), chance):
            batch = RawBatch([each.message for each in group], chance.randrange(5))
            fate = chance.random() if all(each.expected == "maybe" for each in group) else 1.0
            if fate < 0.2:
                damage = expands_too_far if bombs < MAX_BOMBS and chance.random() < 0.01 else chance.choice(DAMAGES)
                bombs += damage is expands_too_far
                data = damage(batch, chance)
                group = [replace(each, expected="corrupt", kind=damage.__name__) for each in group]
            elif fate < 0.35:
                damage = chance.choice(DOUBTS)
                data = damage(batch, chance)
                group = [replace(each, kind=damage.__name__) for each in group]
            else:
                data = batch.encode()
            _send(producer, sent, chance.randrange(kafka.partitions), data, group)
    return sent


def _send(producer: RawProducer, sent: Sent, partition: int, data: bytearray, group: Sequence[RawRecord]) -> None:
    code, base = producer.send(sent.topic, partition, bytes(data))
    if code == 0:
        sent.records |= {(partition, base + n): each for n, each in enumerate(group)}
    else:
        sent.refused += group


def _groups(records: Iterator[RawRecord], chance: Random) -> Iterator[list[RawRecord]]:
    group: list[RawRecord] = []
    size = 1
    for each in records:
        group.append(each)
        if len(group) >= size:
            yield group
            group, size = [], chance.choice((1, 1, 2, 4, 8))
    if group:
        yield group


def _good(number: int, chance: Random) -> RawRecord:
    encoding = chance.choice(ENCODINGS)
    sample = _sample(number, chance)
    message = _message(sample, encoding, chance)
    if chance.random() < 0.3:
        message = replace(message, timestamp=chance.choice(TIMES))
    if chance.random() < 0.2:  # headers of other systems
        message = replace(message, headers=[*message.headers, (b"trace", None), (b"trace", b"\xff\x00"), (b"", b"")])
    return RawRecord(message, "valid", encoding, sample.id)


def _mutant(victim: RawMessage, chance: Random) -> RawRecord:
    if chance.random() < 0.05:
        unreadable = chance.choice(UNREADABLE)
        return RawRecord(unreadable(victim, chance), "corrupt", unreadable.__name__)
    mutations = [chance.choice(MUTATIONS) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
    for mutate in mutations:
        victim = mutate(victim, chance)
    return RawRecord(victim, "maybe", mutations[0].__name__)


def _sample(number: int, chance: Random) -> Sample:
    kind = chance.choice(("PNG", "PNG", "WEBP", "GIF"))
    return Sample(image=picture(number, 16, kind), text=f"picture {number}", domain="fuzz")


def _message(sample: Sample, encoding: Encoding, chance: Random) -> RawMessage:
    encoded = encode(sample, encoding)
    headers = [(name.encode(), value) for name, value in encoded.headers]
    return RawMessage(encoded.value, encoded.key, headers, MILLIS + chance.randrange(10**9))
