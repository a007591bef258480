from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import RegistryUnavailable
from core.settings.streams import Ingest
from ratchet_client.records import REASONS
from streams.ingest import validate as module
from streams.ingest.quarantine import message, original
from streams.ingest.validate import Accepted, Received, Rules, quarantine_row, record_time, validate
from streams.store.rows import Position, record_key
from streams.store.sample_store import SampleStore
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
    value, headers = good(seed)
    return received(value, headers, **fields)


def accepted(result: Accepted | dict[str, Any]) -> dict[str, Any]:
    assert isinstance(result, Accepted), result
    return result.row


def quarantined(result: Accepted | dict[str, Any]) -> dict[str, Any]:
    assert not isinstance(result, Accepted) and result["kind"] == "quarantine", result
    assert result["reason"] in REASONS
    return result


NOW_SECONDS = 1_790_000_000


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        (NOW_SECONDS * 1000 + 250, datetime.fromtimestamp(NOW_SECONDS + 0.25, UTC)),
        (NOW_SECONDS * 10**6 + 250_000, datetime.fromtimestamp(NOW_SECONDS + 0.25, UTC)),
        (NOW_SECONDS * 10**9 + 250_000_000, datetime.fromtimestamp(NOW_SECONDS + 0.25, UTC)),
        (1, datetime.fromtimestamp(0.001, UTC)),
        (0, None),
        (-1, None),
        (-(2**63), None),
        (2**63 - 1, None),
    ],
)
def test_any_create_time_is_a_time_or_none(timestamp: int, expected: datetime | None) -> None:
    time = record_time(timestamp)
    assert time == expected
    before = datetime.now(UTC)
    row = accepted(validate(raw(timestamp=timestamp), RULES))
    if expected is None:
        assert before <= row["time"] <= datetime.now(UTC)
    else:
        assert row["time"] == expected


def test_the_time_that_a_record_names_counts_more_than_that_of_the_log() -> None:
    value = record(time="2026-01-02T03:04:05+02:00")
    row = accepted(validate(received(value, timestamp=NOW_SECONDS * 1000), RULES))
    assert row["time"] == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize("kind", ["BMP", "GIF"])
def test_the_look_is_of_what_a_picture_shows_and_not_of_its_bytes(kind: str) -> None:
    for seed in range(12):
        first = accepted(validate(received(record(picture=picture(seed))), RULES))
        other = accepted(validate(received(record(picture=picture(seed, kind=kind), text="other words")), RULES))
        assert other["look"] == first["look"] and other["id"] != first["id"]


def test_a_null_value_with_a_key_or_an_id_is_a_tombstone() -> None:
    by_key = validate(received(None, key=b"photo-7"), RULES)
    by_id = validate(received(None, [("ratchet_id", b"ab" * 32)]), RULES)
    by_both = validate(received(None, [("ratchet_id", b"ab" * 32)], key=b"photo-7"), RULES)
    assert isinstance(by_key, dict) and isinstance(by_id, dict) and isinstance(by_both, dict)
    assert {each["kind"] for each in (by_key, by_id, by_both)} == {"tombstone"}
    assert (by_key["key"], by_key["id"], by_id["key"], by_id["id"]) == (b"photo-7", None, None, "ab" * 32)
    assert (by_both["key"], by_both["id"]) == (b"photo-7", "ab" * 32)


@pytest.mark.parametrize(
    "name", [b"", b"ab", b"AB" * 32, b"\xff" * 64, b"' OR kind = '" + b"a" * 51, b"ab" * 32 + b"\n"]
)
def test_a_tombstone_whose_id_is_none_is_refused_and_deletes_nothing(name: bytes) -> None:
    for key in (None, b"photo-7"):
        assert quarantined(validate(received(None, [("ratchet_id", name)], key=key), RULES))["reason"] == "headers"


@pytest.mark.parametrize("headers", [[], [("ratchet_id", None)], [("other", b"x")]])
def test_a_null_value_that_names_nothing_is_refused(headers: Headers) -> None:
    for key in (None, b""):
        assert quarantined(validate(received(None, headers, key=key), RULES))["reason"] == "empty"


def test_a_long_key_is_stored_by_its_digest() -> None:
    assert accepted(validate(raw(key=b"k" * 256), RULES))["key"] == b"k" * 256
    long = accepted(validate(raw(key=b"k" * 257), RULES))["key"]
    tombstone = validate(received(None, key=b"k" * 257), RULES)
    assert isinstance(tombstone, dict)
    assert long == tombstone["key"] == record_key(b"k" * 257)
    assert len(long) == 32


def test_a_fault_of_ours_refuses_the_record_and_does_not_stop_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "perceptual_hash", lambda image: 1 / 0)
    row = quarantined(validate(raw(offset=3, key=b"k"), RULES))
    assert (row["reason"], row["offset"], row["original"], row["original_key"]) == ("internal", 3, picture(1), b"k")
    assert row["detail"] == "ZeroDivisionError: division by zero"


def test_records_do_not_reach_paths_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture(1))
    value = json.dumps({"image_uri": f"file://{tmp_path}/secret.png", "text": "t"}).encode()
    assert quarantined(validate(received(value), RULES))["reason"] == "uri_not_allowed"


def test_a_panic_of_a_library_refuses_the_record_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panic(image: object) -> None:
        raise PanicException("index out of bounds")

    monkeypatch.setattr(module, "perceptual_hash", panic)
    assert quarantined(validate(raw(), RULES))["detail"] == "PanicException: index out of bounds"


def test_what_validation_needs_and_is_away_is_no_fault_of_the_record() -> None:
    class Away:
        def read(self, value: bytes) -> dict[str, Any]:
            raise RegistryUnavailable("away")

    rules = Rules(Ingest(), registry=Away())  # type: ignore[arg-type]
    with pytest.raises(RegistryUnavailable):
        validate(received(b"\0\0\0\0\1{}"), rules)


def test_a_quarantined_record_can_be_sent_again_as_it_came() -> None:
    headers: Headers = [("ratchet_text", b""), ("trace", b"\xff\x00"), ("none", None), ("ce_source", b"urn:\xff")]
    row = quarantined(validate(Received("t@2", 1, 9, b"\xff\xfe", b"\x00key", headers), RULES))
    assert row["source"] == "urn:\ufffd"
    record, sent = original(row), message(row)
    given = [(name, value) for name, value in headers if value is not None]
    assert (record.value, record.key, record.headers) == (b"\xff\xfe", b"\x00key", given)
    assert (sent.value, sent.key, sent.headers[:3]) == (record.value, record.key, given)
    ours = dict(sent.headers[3:])
    assert ours["ratchet_null_headers"] == b'["none"]', "an empty header would be another one"
    assert [ours[f"ratchet_{name}"] for name in ("topic", "partition", "offset")] == [b"t@2", b"1", b"9"]
    assert ours["ratchet_reason"] == b"headers"


def wide_png(width: int, height: int) -> bytes:

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


STRINGS = ("text", "domain", "source", "concept", "label")
HOSTILE: dict[str, Received] = {
    **{f"half a surrogate in {name}": received(record(**{name: f"x{HALF}y"})) for name in STRINGS},
    "half a surrogate in question": received(record(text="", question=f"{HALF}?", answer="yes")),
    "half a surrogate in a tag": received(record(tags=[HALF])),
    "half a surrogate in image": received(json.dumps({"image": HALF, "text": "t"}).encode()),
    "half a surrogate in image_uri": received(json.dumps({"image_uri": f"https://{HALF}/", "text": "t"}).encode()),
    "half a surrogate deep in an unknown value": received(record(x=[{"a": {HALF: [HALF]}}])),
    "half a surrogate in a header's name": received(picture(1), [(f"ratchet_{HALF}", b"x"), ("ratchet_text", b"t")]),
    "half a surrogate in another header's name": received(picture(1), [(HALF, b"x"), ("ratchet_text", b"t")]),
    "half a surrogate in a refusal": received(b"nothing", [(HALF, b"x"), ("ce_source", b"\xed\xa0\xbd")]),
    **{f"NUL in {name}": received(record(**{name: "x\0y"})) for name in STRINGS},
    "NUL in headers": received(picture(1), [("ratchet_text", b"\0"), ("ratchet_domain", b"\0"), ("ratchet_\0", b"\0")]),
    "a huge unknown integer": received(record(x=10**300, y=-(2**64), z=2**63)),
    "an unknown integer of 5000 digits": received(b'{"x": ' + b"9" * 5000 + b', "image": "aGk=", "text": "t"}'),
    "a number too large for a float": received(record().replace(b'"text"', b'"x": 1e999, "text"')),
    "a huge integer as time": received(record(time=10**300)),
    "a time that is not finite": received(record(time=float("nan"))),
    "year 1": received(record(time="0001-01-01T00:00:00")),
    "year 1 in an eastern zone": received(record(time="0001-01-01T00:00:00+14:00")),
    "year 9999 in a western zone": received(record(time="9999-12-31T23:59:59.999999-14:00")),
    "year 10000": received(record(time="10000-01-01T00:00:00Z")),
    "a leap second": received(record(time="2026-06-30T23:59:60Z")),
    "more negative time": received(record(time=-62_135_596_801)),
    "a claimed width of 2^31-1": received(record(picture=wide_png(2**31 - 1, 1))),
    "a claimed width of 2^32-1": received(record(picture=wide_png(2**32 - 1, 2**32 - 1))),
    "the largest CreateTime": raw(timestamp=2**63 - 1),
    "a long key": raw(key=b"\xff" * 100_000),
    "the largest offset": Received("t", 2**31 - 1, 2**63 - 2, *good(1)[:1], None, good(1)[1]),
    "a value and a thousand headers": received(picture(1), [("x", None)] * 1000 + [("ratchet_text", b"t")]),
    "no value, hostile key": received(None, key=b"' OR '1'='1\0\xff"),
    "deep JSON": received(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a text of 2000 characters of four bytes": received(record(text="\U0001f6a2" * 2000)),
    "extra in a header": received(picture(1), [("ratchet_text", b"t"), ("ratchet_extra", b'{"a": "\\ud83d"}')]),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    store = SampleStore(str(tmp_path_factory.mktemp("lake")))
    results = [validate(each, RULES) for each in HOSTILE.values()]
    rows = [{**each.row, "split": "train"} if isinstance(each, Accepted) else each for each in results]
    placed = [{**row, "topic": "t", "partition": 0, "offset": number} for number, row in enumerate(rows)]
    store.put(placed, [Position("t", 0, len(rows))])
    dataset = store.table.open()
    assert dataset is not None
    found = dataset.to_table(filter="kind != 'position'").to_pylist()
    found.sort(key=lambda row: int(row["offset"]))
    return dict(zip(HOSTILE, zip(rows, found, strict=True), strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_record_becomes_a_row_that_the_store_takes(
    name: str, written: dict[str, tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    row, stored = written[name]
    if row["kind"] == "quarantine":
        assert row["reason"] in REASONS - {"internal"}, row["detail"]
        message(row)
    for column in row.keys() - {"topic", "partition", "offset"}:
        assert stored[column] == row[column], column


def test_a_corrupt_record_without_bytes_can_be_refused_too() -> None:
    row = quarantine_row(received(None), "corrupt", f"x{HALF}y" * 1000)
    assert (row["original"], len(row["detail"])) == (None, 500)
    assert message(row).value == b""


def test_random_bytes_never_raise() -> None:
    random = np.random.default_rng(5)
    base = [record(tags=["a"], time="2026-01-01T00:00:00Z"), picture(2), b"\0\0\0\0\7" + record()]
    for _ in range(400):
        value = bytearray(base[random.integers(len(base))])
        for _ in range(random.integers(1, 6)):
            value[random.integers(len(value))] = random.integers(256)
        headers = [(bytes(random.integers(32, 127, 5, np.uint8)).decode(), random.bytes(4)) for _ in range(2)]
        result = validate(received(bytes(value), [*headers, ("ratchet_text", random.bytes(3))]), RULES)
        assert isinstance(result, Accepted) or result["reason"] != "internal", result["detail"]
