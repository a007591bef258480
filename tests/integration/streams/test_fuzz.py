"""Records mutated at every level (value, key, headers, time, batch), mixed with good ones: each is accounted for once,
and ingest never stops.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Literal

import pytest

from core.settings.streams import Kafka
from ratchet_client.encoding import Encoding, encode
from ratchet_client.records import Sample
from streams.kafka.record_batches import MAX_HEADERS
from streams.kafka.tolerant_fetch import MAX_BATCH_BYTES
from streams.store.sample_store import SampleStore
from tests.support.broker import Broker
from tests.support.kafka import make_topics, picture, quarantined_places, reading, wait_for
from tests.support.raw_batches import RawBatch, RawMessage, RawProducer, seal

MILLIS = 1_700_000_000_000
#: CreateTime as producers send it: right, unknown, zero, before 1970, in microseconds and nanoseconds, the largest.
TIMES = (
    MILLIS, -1, 0, -62_135_596_800_000, -(2**62), 1, MILLIS * 1_000, MILLIS * 1_000_000, 253_402_300_800_000, 2**63 - 1,
)  # fmt: skip
ODD_JSON: tuple[bytes, ...] = (
    b"", b"null", b"[]", b"{}", b"1e999", b"NaN", b'{"image": NaN}', b'"\\ud800"', b"\xef\xbb\xbf{}", b"{" * 200,
    b"[" * 5_000, b'{"a":' * 2_000, "{}".encode("utf-16"), b'{"text": "\\ud800", "image": "AAAA"}', b'{"image": 1}',
    b'{"image": "data:,x", "text": "a"}', b'{"image_uri": "file:///etc/passwd", "text": "a"}', b'{"tags": {}}',
    b'{"specversion": "1.0", "data": 7}', b'{"specversion": [], "type": {}}', b'{"image": "\\u0000", "text": "a"}',
    b'{"schema": {"type": "struct"}, "payload": null}', b"\x00\x00\x00\x00\x01{}", b"\x00\x00\x00\x00\x01", b"\x00" * 5,
    b'{"time": "9999-12-31T23:59:59+99:00", "text": "a", "image": "AAAA"}', b'{"text": ' + b"9" * 5_000 + b"}",
)  # fmt: skip
FIELDS = ("text", "image", "image_uri", "time", "tags", "source", "schema", "question", "payload", "key", "zzz")
ODD_FIELDS: tuple[object, ...] = (
    None, 7, -1.5, True, [], {}, [[]], "", "x" * 3_000, "\x00", "é" * 300, {"a": {"b": []}}, 10**400,
)  # fmt: skip
#: Headers that are long, empty, without a value, with a value that is not UTF-8 or of the wrong type.
ODD_HEADERS: tuple[tuple[bytes, bytes | None], ...] = (
    (b"", b""), (b"content-type", b"application/cloudevents+json"), (b"content-type", b"\xff"), (b"x", None),
    (b"ratchet_text", None), (b"ratchet_text", b"\xff"), (b"ratchet_text", b"t" * 20_000), (b"ratchet_no", b"x"),
    (b"ratchet_time", b"yesterday"), (b"ratchet_tags", b";" * 500), (b"RATCHET_TEXT", b"upper"), (b"ce_time", b"0"),
    (b"ce_specversion", b"9"), (b"ce_specversion", None), (b"n" * 5_000, b"x"), (b"ratchet_image", b"x"),
    ("ratchet_текст".encode(), b"x"), (b"a\x00b", b"\x00"),
)  # fmt: skip
ENCODINGS: tuple[Encoding, ...] = ("json", "raw", "cloudevents", "cloudevents-binary")
#: Pictures of the records that are mutated, all different from those of the good ones.
VICTIMS = 50
FIRST_VICTIM = 10_000_000
#: Batches of 65 MiB: each takes 0.1 s to look at.
MAX_BOMBS = 3
VALID_SHARE = 0.25
Expected = Literal["valid", "corrupt", "maybe"]


@dataclass(frozen=True)
class RawRecord:
    message: RawMessage
    expected: Expected
    """``valid``: stored as a sample. ``corrupt``: a row of that kind. ``maybe``: one row of any kind."""
    id: str = ""
    """ID of the sample that a valid record becomes."""


def _flip(data: bytes, chance: Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice((1, 1, 3, 20))):
        if out:
            out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    return bytes(out)


def mutated(message: RawMessage, chance: Random) -> RawMessage:
    """What may become a sample, a duplicate or a refusal."""
    value = message.value or b""
    match chance.choice(("flip", "flip", "cut", "random", "json", "fields", "key", "headers", "time")):
        case "flip":
            return replace(message, value=_flip(value, chance))
        case "cut":
            more = chance.randbytes(chance.choice((0, 0, 9)))
            return replace(message, value=value[: chance.randrange(len(value) + 1)] + more)
        case "random":
            return replace(message, value=chance.choice((None, b"", chance.randbytes(chance.randrange(300)))))
        case "json":
            return replace(message, value=chance.choice(ODD_JSON), headers=chance.choice(((), message.headers)))
        case "fields":
            names = chance.sample(FIELDS, chance.randrange(1, len(FIELDS)))
            fields = {name: chance.choice(ODD_FIELDS) for name in names}
            return replace(message, value=json.dumps(fields).encode(), headers=())
        case "key":
            return replace(message, key=chance.choice((None, b"", b"\xff\xfe\x00", b"k" * 5_000, chance.randbytes(40))))
        case "headers":
            more_headers = [chance.choice(ODD_HEADERS) for _ in range(chance.choice((1, 1, 2, 5, 300)))]
            return replace(message, headers=[*message.headers, *more_headers])
        case _:
            return replace(message, timestamp=chance.choice(TIMES))


def unreadable(message: RawMessage, chance: Random) -> RawMessage:
    """With a header name that kafka-python cannot read, or too many headers."""
    if chance.random() < 0.1:
        return replace(message, headers=[(b"", b"")] * (MAX_HEADERS + 1))
    name = chance.choice((b"\xff\xfe", b"ratchet_\xe9t\xe9", b"\xc3", b"\xed\xa0\x80"))
    return replace(message, headers=[*message.headers, (name, b"x"), (b"after", None)])


def damaged(batch: RawBatch, chance: Random) -> bytearray:
    """A batch of which no record can be read."""
    first, *rest = batch.messages
    match chance.choice(("checksum", "magic", "payload", "marker")):
        case "checksum":
            # A bit after the checksum, except in the counts, from which a careless broker numbers its offsets.
            encoded = batch.encode()
            encoded[chance.choice((21, 22, *range(27, 57), *range(61, len(encoded))))] ^= 1 << chance.randrange(8)
            return encoded
        case "magic":  # an unknown batch format, or another than the batch has
            encoded = batch.encode()
            encoded[16] = chance.choice((0, 1, 3, 9, 127, 128, 255))
            return encoded
        case "payload":
            encoded = replace(batch, codec=chance.randrange(1, 5)).encode()
            encoded[61:] = bytes(len(encoded) - 61) if chance.random() < 0.3 else chance.randbytes(len(encoded) - 61)
            return seal(encoded)
        case _:  # it should end a transaction, and does not say which way
            key = b"none"[: chance.randrange(4)]
            return replace(batch, messages=[replace(first, key=key), *rest], attributes=0x20).encode()


def bomb(batch: RawBatch) -> bytearray:
    """A few KiB that expand to 64 MiB, with as many records as the batch has."""
    return replace(batch, messages=[RawMessage(bytes(MAX_BATCH_BYTES + 1)), *batch.messages[1:]], codec=4).encode()


def doubtful(batch: RawBatch, chance: Random) -> bytearray:
    """A batch of which some records may be read."""
    match chance.choice(("body", "body", "count", "time")):
        case "body":
            return batch.encode(_flip(batch.body(), chance))
        case "count":
            encoded, count = batch.encode(), len(batch.messages)
            struct.pack_into(">i", encoded, 57, chance.choice((0, count - 1, count + 1, 2**31 - 1)))
            return seal(encoded)
        case _:  # LogAppendTime, which producers do not set
            return replace(batch, attributes=0x08).encode()


def publish_mutated(kafka: Kafka, count: int) -> dict[tuple[int, int], RawRecord]:
    """Write records to ``kafka.topic``, the same each time, in batches of one to eight with all codecs, some of them
    damaged. Returns those that the broker took, by partition and offset.

    Good records share batches with mutated ones, but not with damage to the batch.
    """
    chance, bombs = Random(1), 0
    sent: dict[tuple[int, int], RawRecord] = {}
    with RawProducer(kafka.bootstrap) as producer:
        for group in _groups(_records(count), chance):
            batch = RawBatch([each.message for each in group], chance.randrange(5))
            fate = chance.random() if all(each.expected == "maybe" for each in group) else 1.0
            if fate < 0.002 and bombs < MAX_BOMBS:
                bombs += 1
                data = bomb(batch)
            elif fate < 0.2:
                data = damaged(batch, chance)
            else:
                data = doubtful(batch, chance) if fate < 0.35 else batch.encode()
            if fate < 0.2:
                group = [replace(each, expected="corrupt") for each in group]
            partition = chance.randrange(kafka.partitions)
            code, base = producer.send(kafka.topic, partition, bytes(data))
            if code == 0:
                sent |= {(partition, base + n): each for n, each in enumerate(group)}
    return sent


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


def _records(count: int) -> Iterator[RawRecord]:
    chance = Random(2)
    victims = [_message(_sample(FIRST_VICTIM + n, chance), ENCODINGS[n % 4], chance) for n in range(VICTIMS)]
    for number in range(count):
        if chance.random() < VALID_SHARE:
            yield _good(number, chance)
        elif chance.random() < 0.05:
            yield RawRecord(unreadable(chance.choice(victims), chance), "corrupt")
        else:
            message = chance.choice(victims)
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                message = mutated(message, chance)
            yield RawRecord(message, "maybe")


def _good(number: int, chance: Random) -> RawRecord:
    sample = _sample(number, chance)
    message = _message(sample, chance.choice(ENCODINGS), chance)
    if chance.random() < 0.3:
        message = replace(message, timestamp=chance.choice(TIMES))
    if chance.random() < 0.2:  # headers of other systems
        message = replace(message, headers=[*message.headers, (b"trace", None), (b"trace", b"\xff\x00"), (b"", b"")])
    return RawRecord(message, "valid", sample.id)


def _sample(number: int, chance: Random) -> Sample:
    kind = chance.choice(("PNG", "PNG", "WEBP", "GIF"))
    return Sample(image=picture(number, 16, kind), text=f"picture {number}", domain="fuzz")


def _message(sample: Sample, encoding: Encoding, chance: Random) -> RawMessage:
    encoded = encode(sample, encoding)
    headers = [(name.encode(), value) for name, value in encoded.headers]
    return RawMessage(encoded.value, encoded.key, headers, MILLIS + chance.randrange(10**9))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.long)])
def test_any_bytes_end_as_a_sample_a_duplicate_a_tombstone_or_in_quarantine(
    broker: Broker, tmp_path: Path, count: int
) -> None:
    settings = broker.settings(tmp_path, ingest={"processes": 2})
    make_topics(settings)
    sent = publish_mutated(settings.kafka, count)
    assert len(sent) > count * (0.9 if broker.embedded else 0.5)  # Apache Kafka refuses odd timestamps
    store = SampleStore(settings.lake)
    problems: set[str] = set()
    with reading(settings, lambda status: problems.add(status.problem)):
        wait_for(lambda: store.tally().total() > 0 and accounted(store) >= len(sent), "every record", 400)
        refusals = store.tally()["quarantine"]
        published = quarantined_places(settings.kafka, refusals)
    slow = f"the sample store {store.url} does not answer within"
    own = {problem for problem in problems if problem and slow not in problem}
    assert not own, "ingest was down, and not because this machine was busy"

    rows = store.records().to_pylist()
    kinds = {(row["partition"], row["offset"]): row["kind"] for row in rows}
    assert len(rows) == len(kinds), "a record was accounted for twice"
    assert kinds.keys() == sent.keys()
    stored = {row["id"]: (row["partition"], row["offset"]) for row in rows if row["kind"] == "sample"}
    valid = {each.id: at for at, each in sent.items() if each.expected == "valid"}
    assert valid.items() <= stored.items(), "a valid record was not stored as what it is"
    reasons = {(row["partition"], row["offset"]): row["reason"] for row in rows}
    assert {reasons[at] for at, each in sent.items() if each.expected == "corrupt"} == {"corrupt"}
    assert reasons and "internal" not in reasons.values(), "a fault of ours refused a record"

    refused = [(row["topic"], row["partition"], row["offset"]) for row in rows if row["kind"] == "quarantine"]
    assert sorted(published) == sorted(refused), "each refusal is in the quarantine topic once"


def accounted(store: SampleStore) -> int:
    """Records that have a row; a record that was corrected by another has a receipt."""
    tally = store.tally()
    return sum(tally[kind] for kind in ("sample", "duplicate", "quarantine", "tombstone", "deleted"))
