from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pytest

from core.errors import RegistryUnavailable
from core.settings.streams import Ingest
from ratchet_client.records import REASONS
from streams.ingest import validate as module
from streams.ingest.quarantine import message, original
from streams.ingest.validate import Accepted, Received, Rules, quarantine_row, record_time, validate
from streams.store.rows import Position, record_key
from streams.store.sample_store import SampleStore
from tests.support.hostile_images import png
from tests.support.kafka import good, picture

RULES = Rules(Ingest())
HALF = "\ud83d"
Headers = Sequence[tuple[str, bytes | None]]


def received(value: bytes | None, headers: Headers = (), offset: int = 0, **fields: Any) -> Received:
    return Received("t", 0, offset, value, fields.pop("key", None), headers, **fields)


def record(**fields: Any) -> bytes:
    image = base64.b64encode(fields.pop("picture", None) or picture(1)).decode()
    return json.dumps({"image": image, "text": "a boat", **fields}).encode()


def raw(seed: int = 1, **fields: Any) -> Received:
    return received(*good(seed), **fields)


def accepted(received: Received) -> dict[str, Any]:
    result = validate(received, RULES)
    assert isinstance(result, Accepted), result
    return result.row


def refused(received: Received) -> dict[str, Any]:
    row = validate(received, RULES)
    assert not isinstance(row, Accepted) and row["kind"] == "quarantine" and row["reason"] in REASONS, row
    return row


def tombstone(*given: Any, **fields: Any) -> tuple[bytes | None, str | None]:
    row = validate(received(None, *given, **fields), RULES)
    assert isinstance(row, dict) and row["kind"] == "tombstone", row
    return row["key"], row["id"]


SECONDS = 1_790_000_000


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        (SECONDS * 1000 + 250, SECONDS + 0.25),
        (SECONDS * 10**6 + 250_000, SECONDS + 0.25),
        (SECONDS * 10**9 + 250_000_000, SECONDS + 0.25),
        (1, 0.001),
        (0, None),
        (-1, None),
        (-(2**63), None),
        (2**63 - 1, None),
    ],
)
def test_any_create_time_is_a_time_or_none(timestamp: int, expected: float | None) -> None:
    time = None if expected is None else datetime.fromtimestamp(expected, UTC)
    assert record_time(timestamp) == time
    before = datetime.now(UTC)
    stored = accepted(raw(timestamp=timestamp))["time"]
    assert stored == time if time else before <= stored <= datetime.now(UTC)
    named = accepted(received(record(time="2026-01-02T03:04:05+02:00"), timestamp=timestamp))
    assert named["time"] == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC), "a time in the record counts more"


@pytest.mark.parametrize("kind", ["BMP", "GIF"])
def test_the_look_is_of_what_a_picture_shows_and_not_of_its_bytes(kind: str) -> None:
    for seed in range(12):
        first = accepted(received(record(picture=picture(seed))))
        other = accepted(received(record(picture=picture(seed, kind=kind), text="other words")))
        assert other["look"] == first["look"] and other["id"] != first["id"]


def test_a_null_value_with_a_key_or_an_id_is_a_tombstone() -> None:
    named = [("ratchet_id", b"ab" * 32)]
    assert tombstone(key=b"photo-7") == (b"photo-7", None)
    assert tombstone(named) == (None, "ab" * 32)
    assert tombstone(named, key=b"photo-7") == (b"photo-7", "ab" * 32)
    assert accepted(raw(key=b"k" * 256))["key"] == b"k" * 256
    long = accepted(raw(key=b"k" * 257))["key"]
    assert long == tombstone(key=b"k" * 257)[0] == record_key(b"k" * 257) and len(long) == 32, "by its digest"


@pytest.mark.parametrize(
    "name", [b"", b"ab", b"AB" * 32, b"\xff" * 64, b"' OR kind = '" + b"a" * 51, b"ab" * 32 + b"\n"]
)
def test_a_tombstone_whose_id_is_none_is_refused_and_deletes_nothing(name: bytes) -> None:
    for key in (None, b"photo-7"):
        assert refused(received(None, [("ratchet_id", name)], key=key))["reason"] == "headers"


@pytest.mark.parametrize("headers", [[], [("ratchet_id", None)], [("other", b"x")]])
def test_a_null_value_that_names_nothing_is_refused(headers: Headers) -> None:
    for key in (None, b""):
        assert refused(received(None, headers, key=key))["reason"] == "empty"


class PanicException(BaseException):
    """As pyo3 raises it."""


@pytest.mark.parametrize("fault", [ZeroDivisionError("division by zero"), PanicException("index out of bounds")])
def test_a_fault_of_ours_refuses_the_record_and_does_not_stop_the_stream(
    monkeypatch: pytest.MonkeyPatch, fault: BaseException
) -> None:
    def fail(image: object) -> None:
        raise fault

    monkeypatch.setattr(module, "perceptual_hash", fail)
    row = refused(raw(offset=3, key=b"k"))
    assert (row["reason"], row["offset"], row["original"], row["original_key"]) == ("internal", 3, picture(1), b"k")
    assert row["detail"] == f"{type(fault).__name__}: {fault}"


def test_what_validation_needs_and_is_away_is_no_fault_of_the_record() -> None:
    class Away:
        def read(self, value: bytes) -> dict[str, Any]:
            raise RegistryUnavailable("away")

    with pytest.raises(RegistryUnavailable):
        validate(received(b"\0\0\0\0\1{}"), Rules(Ingest(), registry=Away()))  # type: ignore[arg-type]


def test_a_quarantined_record_can_be_sent_again_as_it_came() -> None:
    headers: Headers = [("ratchet_text", b""), ("trace", b"\xff\x00"), ("none", None), ("ce_source", b"urn:\xff")]
    row = refused(Received("t@2", 1, 9, b"\xff\xfe", b"\x00key", headers))
    assert row["source"] == "urn:\ufffd"
    record, sent = original(row), message(row)
    given = [(name, value) for name, value in headers if value is not None]
    assert (record.value, record.key, record.headers) == (b"\xff\xfe", b"\x00key", given)
    assert (sent.value, sent.key, sent.headers[:3]) == (record.value, record.key, given)
    ours = dict(sent.headers[3:])
    assert ours["ratchet_null_headers"] == b'["none"]', "an empty header would be another one"
    assert [ours[f"ratchet_{name}"] for name in ("topic", "partition", "offset")] == [b"t@2", b"1", b"9"]
    assert ours["ratchet_reason"] == b"headers"
    row = quarantine_row(received(None), "corrupt", f"x{HALF}y" * 1000)
    assert (row["original"], len(row["detail"]), message(row).value) == (None, 500, b""), "corrupt, without bytes"


HOSTILE: dict[str, Received] = {
    "half a surrogate in a text": received(record(text=f"x{HALF}y")),
    "half a surrogate in a tag": received(record(tags=[HALF])),
    "half a surrogate in image_uri": received(json.dumps({"image_uri": f"https://{HALF}/", "text": "t"}).encode()),
    "half a surrogate deep in an unknown value": received(record(x=[{"a": {HALF: [HALF]}}])),
    "half a surrogate in a header's name": received(picture(1), [(f"ratchet_{HALF}", b"x"), ("ratchet_text", b"t")]),
    "half a surrogate in another header's name": received(picture(1), [(HALF, b"x"), ("ratchet_text", b"t")]),
    "half a surrogate in a refusal": received(b"nothing", [(HALF, b"x"), ("ce_source", b"\xed\xa0\xbd")]),
    "NUL in all fields": received(record(**dict.fromkeys(("text", "domain", "source", "concept", "label"), "x\0y"))),
    "NUL in headers": received(picture(1), [("ratchet_text", b"\0"), ("ratchet_domain", b"\0"), ("ratchet_\0", b"\0")]),
    "a huge unknown integer": received(record(x=10**300, y=-(2**64), z=2**63)),
    "an unknown integer of 5000 digits": received(b'{"x": ' + b"9" * 5000 + b', "image": "aGk=", "text": "t"}'),
    "a number too large for a float": received(record().replace(b'"text"', b'"x": 1e999, "text"')),
    "a huge integer as time": received(record(time=10**300)),
    "a time that is not finite": received(record(time=float("nan"))),
    "year 1 in an eastern zone": received(record(time="0001-01-01T00:00:00+14:00")),
    "year 9999 in a western zone": received(record(time="9999-12-31T23:59:59.999999-14:00")),
    "year 10000": received(record(time="10000-01-01T00:00:00Z")),
    "a leap second": received(record(time="2026-06-30T23:59:60Z")),
    "more negative time": received(record(time=-62_135_596_801)),
    "a claimed width of 2^32-1": received(record(picture=png(2**32 - 1, 2**32 - 1, 8, 0, b"\0" * 9))),
    "the largest CreateTime": raw(timestamp=2**63 - 1),
    "a long key": raw(key=b"\xff" * 100_000),
    "the largest offset": Received("t", 2**31 - 1, 2**63 - 2, *good(1)[:1], None, good(1)[1]),
    "a value and a thousand headers": received(picture(1), [("x", None)] * 1000 + [("ratchet_text", b"t")]),
    "no value, hostile key": received(None, key=b"' OR '1'='1\0\xff"),
    "deep JSON": received(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a text of 2000 characters of four bytes": received(record(text="\U0001f6a2" * 2000)),
    "extra in a header": received(picture(1), [("ratchet_text", b"t"), ("ratchet_extra", b'{"a": "\\ud83d"}')]),
}


def test_a_hostile_record_becomes_a_row_that_the_store_takes(store: SampleStore) -> None:
    results = [validate(each, RULES) for each in HOSTILE.values()]
    rows = [{**each.row, "split": "train"} if isinstance(each, Accepted) else each for each in results]
    placed = [{**row, "topic": "t", "partition": 0, "offset": number} for number, row in enumerate(rows)]
    store.put(placed, [Position("t", 0, len(rows))])
    dataset = store.table.open()
    assert dataset is not None
    found = {row["offset"]: row for row in dataset.to_table(filter="kind != 'position'").to_pylist()}
    for number, (name, row) in enumerate(zip(HOSTILE, placed, strict=True)):
        if row["kind"] == "quarantine":
            assert row["reason"] in REASONS - {"internal"}, f"{name}: {row['detail']}"
            message(row)
        assert {column: found[number][column] for column in row} == row, name
