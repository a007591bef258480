from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import RecordError
from ratchet_client.encoding import encode
from ratchet_client.extra import MAX_BYTES, MAX_DEPTH, MAX_FIELDS
from ratchet_client.images import sniff
from ratchet_client.records import METADATA, REASONS, SCHEMA, Sample, check_text
from streams.records.codecs import decode, glimpse
from streams.records.registry import SchemaRegistry
from tests.support.confluent import message_types, write_avro, write_json, write_protobuf
from tests.support.kafka import picture
from tests.support.registry import Registry, running

PNG = picture(1, size=8)
B64 = base64.b64encode(PNG).decode()
DIGEST = "sha256:" + hashlib.sha256(PNG).hexdigest()
EVENT = {"specversion": "1.0", "type": SCHEMA, "source": "urn:cam", "id": "1"}
ENCODINGS = ["json", "raw", "cloudevents", "cloudevents-binary"]
Pairs = Sequence[tuple[str, bytes | None]]


def read(record: Any, *headers: tuple[str, bytes]) -> Sample:
    return decode(json.dumps(record).encode(), headers)


def refused(record: Any, *headers: tuple[str, bytes]) -> str:
    with pytest.raises(RecordError) as caught:
        read(record, *headers)
    assert caught.value.fix
    str(caught.value).encode()
    return f"{caught.value.reason}: {caught.value.message}"


# -- what is read --------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
NESTED = st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(WORDS, v, max_size=3), max_leaves=6)
SAMPLES = st.builds(
    Sample,
    image=st.sampled_from([PNG, picture(2, kind="JPEG"), picture(3, kind="WEBP"), picture(4, kind="GIF")]),
    text=WORDS,
    time=st.none() | st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    tags=st.lists(st.from_regex(r"[a-zé]{1,8}", fullmatch=True), max_size=4).map(tuple),
    extra=st.dictionaries(WORDS, NESTED, max_size=4),
    **dict.fromkeys(("question", "answer", "domain", "source", "concept", "label"), TEXT),
)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_what_is_encoded_is_decoded(encoding: Any) -> None:
    @settings(deadline=None, max_examples=60)
    @given(SAMPLES)
    def round_trip(sample: Sample) -> None:
        message = encode(sample, encoding)
        assert decode(message.value, message.headers) == sample
        assert message.key == sample.id.encode()

    round_trip()


def test_an_image_may_be_a_data_uri_or_base64_with_line_breaks() -> None:
    lines = "\n".join(B64[start : start + 76] for start in range(0, len(B64), 76))
    for image in (B64, f"data:image/png;base64,{B64}", lines):
        assert read({"image": image, "text": "t"}) == Sample(image=PNG, text="t")


def test_events_of_the_official_sdk_are_read() -> None:
    attributes = {"type": SCHEMA, "source": "urn:cam", "domain": "sea", "traceid": "7"}
    record = {"image": B64, "text": "t"}
    events = [
        bind(CloudEvent({**attributes, **more}, data), JSONFormat())
        for bind in (to_structured, to_binary)
        for more, data in (({}, record), ({"text": "t", "datacontenttype": "image/png"}, PNG))
    ]
    for event in events:
        sample = decode(event.value, list(event.headers.items()))
        assert (sample.image, sample.text, sample.source, sample.domain) == (PNG, "t", "urn:cam", "sea")
        assert sample.time is not None and sample.extra == {"traceid": "7"}


def test_kafka_connect_is_unwrapped_with_its_schema_or_without() -> None:
    fields = [{"field": "image", "type": "bytes"}, {"field": "text", "type": "string"}]
    for schema in (None, {"type": "struct", "fields": fields, "optional": False}):
        record = {"schema": schema, "payload": {"image": B64, "text": "t", "label": None, "a": 1}}
        assert read(record) == Sample(image=PNG, text="t", extra={"a": 1})
    image = json.dumps({"schema": {"type": "bytes", "optional": False}, "payload": B64}).encode()
    assert decode(image, [("ratchet_text", b"t")]) == Sample(image=PNG, text="t")
    assert glimpse(image, [("ratchet_text", b"t")]) == (PNG, {"text": "t"})
    assert "payload" in refused({"schema": None, "payload": [1]})


def test_what_is_not_ours_is_kept_under_the_name_that_it_has() -> None:
    others = {"colour": "red", "boxes": [{"x": 1.5}], "Text": "T", "none": None}
    sample = read({"image": B64, "text": "t", "schema": f"{SCHEMA}.7", **others})
    assert (sample.text, sample.extra) == ("t", others)
    sample = decode(PNG, [("Ratchet_Text", b"t"), ("ratchet_Colour", b"red"), ("ratchet_grün", b"1"), ("trace", b"x")])
    assert (sample.text, sample.extra) == ("t", {"Colour": "red", "grün": "1"})
    binary = [(f"ce_{name}", text.encode()) for name, text in EVENT.items()]
    headers = [*binary, ("ce_traceparent", b"00-1"), ("ce_text", b"t"), ("ce_subject", b"7"), ("ce_dataschema", b"s")]
    assert decode(PNG, headers).extra == {"traceparent": "00-1", "subject": "7"}
    event = {**EVENT, "a": 1, "b": 1, "c": 1, "data": {"image": B64, "text": "t", "b": 2, "c": 2}}
    assert read(event, ("ratchet_c", b"3")).extra == {"a": 1, "b": 2, "c": "3"}, "a header counts most, an event least"


def test_headers_of_the_quarantine_topic_are_no_fields_of_a_record_that_is_sent_again() -> None:
    record = {"image": B64, "text": "t"}
    names = ("reason", "detail", "topic", "partition", "offset", "refused_at")
    assert read(record, *((f"ratchet_{name}", b"1") for name in names)).extra == {}
    assert read(record, ("ratchet_topic", b"boats")).extra == {"topic": "boats"}


def test_a_minor_version_is_read_and_a_major_one_refused_in_headers_too() -> None:
    for schema in ("ratchet.sample.v1", "ratchet.sample.v1.12"):
        assert decode(PNG, [("ratchet_text", b"t"), ("ratchet_schema", schema.encode())]).text == "t"
        event = {**EVENT, "text": "t", "type": schema}
        assert decode(PNG, [(f"ce_{name}", text.encode()) for name, text in event.items()]).text == "t"
    with pytest.raises(RecordError, match="v2"):
        decode(PNG, [("ratchet_text", b"t"), ("ratchet_schema", b"ratchet.sample.v2")])


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "t"}, "image_missing"),
        ({"image": "", "text": "t"}, "image_missing"),
        ({"image": B64}, "text_missing"),
        ({"image": "!!", "text": "t"}, "image_undecodable"),
        ({"image": "data:image/svg+xml,<svg/>", "text": "t"}, "image_undecodable"),
        ({"image": 7, "text": "t"}, "schema"),
        ({"image": B64, "text": "t", "schema": "ratchet.sample.v11"}, "schema"),
        ({"image": B64, "image_uri": "file:///x", "text": "t"}, "schema"),
        ({"image_uri": "file:///etc/passwd", "text": "t"}, "uri_not_allowed"),
        ({"image": "A" * 40_000_000, "text": "t"}, "image_too_large"),
        ({**EVENT, "type": "other"}, "schema"),
        ({"specversion": "1.0", "type": SCHEMA, "id": "1", "data": {}}, "schema"),
        ([1, 2], "not_json"),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(record: Any, reason: str) -> None:
    assert refused(record).startswith(f"{reason}: ")


def test_long_texts_an_image_in_a_header_and_what_could_hold_none_are_refused() -> None:
    for name in ("text", "question", "answer"):
        sample = Sample(image=PNG, **{"text": "t", name: "x" * 11})
        with pytest.raises(RecordError, match=name) as caught:
            check_text(sample, 10)
        assert caught.value.reason == "text_too_long"
        check_text(sample, 11)
    for name in ("image", "image_uri", "IMAGE"):
        with pytest.raises(RecordError, match=name.lower()) as caught:
            decode(PNG, [("ratchet_text", b"t"), (f"ratchet_{name}", b"x")])
        assert caught.value.reason == "headers"
    with pytest.raises(RecordError) as caught:
        decode(b'{"a": [' + b"{}," * 1_000_000 + b"{}]}", max_image_bytes=1024)
    assert caught.value.reason == "image_too_large", "it is not parsed"


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth - 1):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({f"f{number}": 1 for number in range(MAX_FIELDS + 1)}, f"f{MAX_FIELDS}"),
        ({"small": 1, "large": "x" * MAX_BYTES}, "large"),
        ({"wide": [{}] * MAX_BYTES}, "wide"),
        ({"escaped": "ä" * (MAX_BYTES // 4)}, "escaped"),
        ({"deep": nested(MAX_DEPTH + 1)}, "deep"),
        ({"nest": {"\udfff": 1}}, "nest"),
        ({"x" * 257: 1}, "xxx"),
    ],
)
def test_a_field_over_a_bound_is_refused_by_its_name(extra: dict[str, Any], named: str) -> None:
    told = refused({"image": B64, "text": "t", **extra})
    assert told.startswith("schema: ") and named in told


@pytest.mark.parametrize("image", [{"image": B64}, {"image_uri": "https://cdn.test/a"}])
def test_an_image_that_is_not_the_one_whose_digest_is_stated_is_refused(image: dict[str, str]) -> None:
    def fetched(**fields: Any) -> bytes:
        return decode(json.dumps({"text": "a boat", **image, **fields}).encode(), fetch=lambda uri: PNG).image

    sha512 = "sha512:" + hashlib.sha512(PNG).hexdigest()
    assert fetched() == fetched(image_digest=DIGEST) == fetched(image_digest=sha512) == PNG
    for digest, reason in (
        ("sha256:" + "0" * 64, "uri_digest"), ("sha512:" + "0" * 128, "uri_digest"), ("sha256:0", "schema"),
        (5, "schema"), ("", "schema"),
    ):  # fmt: skip
        with pytest.raises(RecordError) as caught:
            fetched(image_digest=digest)
        assert caught.value.reason == reason


# -- whatever comes is read or refused -----------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(), max_size=12)  # halves of surrogate pairs, too
NAMES = st.sampled_from([*METADATA, "image", "image_uri", "schema", "payload", "specversion", "type", "data", "id"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ANY_TEXT | st.sampled_from([B64, SCHEMA, "1.0", 10**400]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | ANY_TEXT, inner, max_size=4),
    max_leaves=8,
)
RECORDS = st.dictionaries(NAMES | ANY_TEXT, VALUES, max_size=8).map(lambda record: json.dumps(record).encode())
HEADER_NAMES = st.sampled_from(["ratchet_", "ce_", "RATCHET_", "Ce_", ""]).flatmap(
    lambda prefix: (NAMES | ANY_TEXT).map(lambda name: prefix + name)
) | st.just("content-type")
HEADER_VALUES = (
    st.none() | st.binary(max_size=12) | st.sampled_from([b"1.0", SCHEMA.encode(), b"image/png", b"{}", b"t"])
)
HEADERS = st.lists(st.tuples(HEADER_NAMES, HEADER_VALUES), max_size=8)
fuzzed = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def server() -> Iterator[Registry]:
    with running(Registry()) as registry:
        yield registry


@pytest.fixture(scope="module")
def registry(server: Registry) -> Iterator[SchemaRegistry]:
    registry = SchemaRegistry(server.url)
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def confluent(server: Registry) -> list[bytes]:
    message = message_types()["Sample"](image=PNG, text="t", tags=["a"])
    message.boxes.add(x=1)
    avro = {"image": PNG, "text": "t", "tags": ["a"], "boxes": [{"x": 1.0}]}
    record = {"image": B64, "text": "t", "a": 1}
    return [write_avro(server.url, avro), write_protobuf(server.url, message), write_json(server.url, record)]


def ends(value: bytes | None, headers: Pairs = (), registry: SchemaRegistry | None = None) -> None:
    glimpse(value, headers)
    try:
        sample = decode(value, headers, registry=registry)
    except RecordError as error:
        assert error.reason in REASONS and error.fix and len(str(error)) < 1000
        str(error).encode()
    else:
        for encoding in ENCODINGS if sniff(sample.image) else ("json",):
            message = encode(sample, encoding)  # type: ignore[arg-type]
            assert decode(message.value, message.headers) == sample


@fuzzed
@given(st.none() | st.binary(max_size=60) | RECORDS, HEADERS)
def test_any_bytes_and_any_json(value: bytes | None, headers: Pairs) -> None:
    ends(value, headers)


@fuzzed
@given(st.integers(0, 4), st.binary(max_size=40), st.integers(0, 2), st.integers(0, 10_000), st.integers(0, 255))
def test_any_bytes_behind_a_schema_id_and_a_record_with_any_byte_changed(
    registry: SchemaRegistry, confluent: list[bytes], number: int, tail: bytes, kind: int, place: int, byte: int
) -> None:
    ends(b"\0" + number.to_bytes(4, "big") + tail, registry=registry)
    value = bytearray(confluent[kind])
    value[5 + place % (len(value) - 5)] = byte
    ends(bytes(value), registry=registry)
