from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from cloudevents.core.bindings.kafka import to_binary, to_structured
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.errors import RecordError
from ratchet_client.encoding import encode
from ratchet_client.images import sniff
from ratchet_client.records import METADATA, REASONS, SCHEMA, Sample
from streams.records.codecs import decode, glimpse
from streams.records.registry import SchemaRegistry
from tests.support.confluent import message_types, write_avro, write_json, write_protobuf
from tests.support.kafka import picture
from tests.support.registry import Registry, running

PNG = picture(1, size=8)
B64 = base64.b64encode(PNG).decode()
Pairs = Sequence[tuple[str, bytes | None]]
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


def ends(value: bytes | None, headers: Pairs, registry: SchemaRegistry | None = None) -> None:
    glimpse(value, headers)
    try:
        sample = decode(value, headers, registry=registry)
    except RecordError as error:
        assert error.reason in REASONS and error.fix and len(str(error)) < 1000
        str(error).encode()
    else:
        for encoding in ("json", "raw", "cloudevents", "cloudevents-binary") if sniff(sample.image) else ("json",):
            message = encode(sample, encoding)  # type: ignore[arg-type]
            assert decode(message.value, message.headers) == sample


fuzzed = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])


@fuzzed
@given(st.none() | st.binary(max_size=60), HEADERS)
def test_any_bytes(value: bytes | None, headers: Pairs) -> None:
    ends(value, headers)


@fuzzed
@given(RECORDS, HEADERS)
def test_any_json(value: bytes, headers: Pairs) -> None:
    ends(value, headers)


@fuzzed
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(METADATA, VALUES)), VALUES, HEADERS)
def test_a_good_record_with_any_fields(fields: dict[str, Any], other: Any, headers: Pairs) -> None:
    record = {"image": B64, "text": "t", **fields, "other": other}
    ends(json.dumps(record).encode(), headers)
    event = {"specversion": "1.0", "type": SCHEMA, "source": "s", "id": "1"}
    ends(json.dumps({**event, **fields, "data": record}).encode(), headers)
    ends(json.dumps({"schema": other, "payload": record}).encode(), headers)


@fuzzed
@given(st.integers(0, 4), st.binary(max_size=40))
def test_any_bytes_behind_a_schema_id(
    registry: SchemaRegistry, confluent: list[bytes], number: int, tail: bytes
) -> None:
    ends(b"\0" + number.to_bytes(4, "big") + tail, [], registry)


@fuzzed
@given(st.integers(0, 2), st.integers(0, 10_000), st.integers(0, 255))
def test_a_record_with_any_byte_changed(
    registry: SchemaRegistry, confluent: list[bytes], kind: int, place: int, byte: int
) -> None:
    value = bytearray(confluent[kind])
    value[5 + place % (len(value) - 5)] = byte
    ends(bytes(value), [], registry)


def test_a_record_cut_off_anywhere_is_refused(registry: SchemaRegistry, confluent: list[bytes]) -> None:
    connect = json.dumps({"schema": None, "payload": {"image": B64, "text": "t"}}).encode()
    for value in (*confluent, connect):
        assert decode(value, registry=registry).image == PNG
        for length in range(len(value)):
            ends(value[:length], [], registry)


def test_a_record_that_could_hold_no_image_is_not_parsed() -> None:
    with pytest.raises(RecordError) as caught:
        decode(b'{"a": [' + b"{}," * 1_000_000 + b"{}]}", max_image_bytes=1024)
    assert caught.value.reason == "image_too_large"


def test_kafka_connect_is_unwrapped_with_its_schema_or_without() -> None:
    fields = [{"field": "image", "type": "bytes"}, {"field": "text", "type": "string"}]
    for schema in (None, {"type": "struct", "fields": fields, "optional": False}):
        value = json.dumps({"schema": schema, "payload": {"image": B64, "text": "t", "label": None, "a": 1}}).encode()
        assert decode(value) == Sample(image=PNG, text="t", extra={"a": 1})
    image = json.dumps({"schema": {"type": "bytes", "optional": False}, "payload": B64}).encode()
    assert decode(image, [("ratchet_text", b"t")]) == Sample(image=PNG, text="t")
    assert glimpse(image, [("ratchet_text", b"t")]) == (PNG, {"text": "t"})
    with pytest.raises(RecordError, match="payload") as caught:
        decode(b'{"schema": null, "payload": [1]}')
    assert caught.value.reason == "schema"


def test_events_of_the_official_sdk_are_read() -> None:
    attributes = {"type": SCHEMA, "source": "urn:cam", "domain": "sea", "traceid": "7"}
    record = {"image": B64, "text": "t"}
    events = [
        to_structured(CloudEvent({**attributes}, record), JSONFormat()),
        to_structured(CloudEvent({**attributes, "text": "t", "datacontenttype": "image/png"}, PNG), JSONFormat()),
        to_binary(CloudEvent({**attributes}, record), JSONFormat()),
        to_binary(CloudEvent({**attributes, "text": "t", "datacontenttype": "image/png"}, PNG), JSONFormat()),
    ]
    for event in events:
        sample = decode(event.value, list(event.headers.items()))
        assert (sample.image, sample.text, sample.source, sample.domain) == (PNG, "t", "urn:cam", "sea")
        assert sample.time is not None and sample.extra == {"traceid": "7"}
