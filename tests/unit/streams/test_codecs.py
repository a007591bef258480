from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import RecordError
from ratchet_client.encoding import encode
from ratchet_client.extra import MAX_BYTES, MAX_DEPTH, MAX_FIELDS
from ratchet_client.records import SCHEMA, Sample, check_text
from streams.records.codecs import decode
from tests.support.kafka import picture

PNG = picture(1)
B64 = base64.b64encode(PNG).decode()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT


def FIELDS(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(WORDS, values, max_size=3)


SAMPLES = st.builds(
    Sample,
    image=st.sampled_from([PNG, picture(2, kind="JPEG"), picture(3, kind="WEBP"), picture(4, kind="GIF")]),
    text=WORDS,
    question=TEXT,
    answer=TEXT,
    domain=TEXT,
    source=TEXT,
    time=st.none() | st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    tags=st.lists(st.from_regex(r"[a-zé]{1,8}", fullmatch=True), max_size=4).map(tuple),
    concept=TEXT,
    label=TEXT,
    extra=st.dictionaries(
        WORDS, st.recursive(SCALARS, lambda v: st.lists(v, max_size=3) | FIELDS(v), max_leaves=6), max_size=4
    ),
)


@pytest.mark.parametrize("encoding", ["json", "raw", "cloudevents", "cloudevents-binary"])
def test_what_is_encoded_is_decoded(encoding: Any) -> None:
    @settings(deadline=None, max_examples=60)
    @given(SAMPLES)
    def round_trip(sample: Sample) -> None:
        message = encode(sample, encoding)
        assert decode(message.value, message.headers) == sample
        assert message.key == sample.id.encode()

    round_trip()


def test_plain_json_needs_no_headers() -> None:
    sample = decode(json.dumps({"image": B64, "text": "a red boat"}).encode())
    assert (sample.image, sample.text, sample.domain) == (PNG, "a red boat", "")


def test_a_data_uri_and_line_breaks_in_base64_are_taken() -> None:
    lines = "\n".join(B64[start : start + 76] for start in range(0, len(B64), 76))
    for image in (f"data:image/png;base64,{B64}", lines):
        assert decode(json.dumps({"image": image, "text": "t"}).encode()).image == PNG


def test_a_structured_event_may_carry_the_image_itself() -> None:
    event = {"specversion": "1.0", "type": SCHEMA, "source": "urn:cam", "id": "1", "time": "2026-01-02T00:00:00Z"}
    event |= {"datacontenttype": "image/png", "data_base64": B64, "text": "a boat", "domain": "sea", "traceid": "x"}
    sample = decode(json.dumps(event).encode(), [("content-type", b"application/cloudevents+json; charset=utf-8")])
    assert (sample.text, sample.domain, sample.source, sample.image) == ("a boat", "sea", "urn:cam", PNG)
    assert sample.time == datetime(2026, 1, 2, tzinfo=UTC)


def test_a_binary_event_may_carry_the_record_as_json() -> None:
    headers = {"ce_specversion": "1.0", "ce_type": SCHEMA, "ce_source": "urn:cam", "ce_id": "1"}
    pairs = [(name, text.encode()) for name, text in headers.items()] + [("Content-Type", b"application/json")]
    sample = decode(json.dumps({"image": B64, "text": "a boat"}).encode(), pairs)
    assert (sample.text, sample.source) == ("a boat", "urn:cam")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "t"}, "image_missing"),
        ({"image": "", "text": "t"}, "image_missing"),
        ({"image": B64}, "text_missing"),
        ({"image": B64, "question": "what?"}, "text_missing"),
        ({"image": "!!", "text": "t"}, "image_undecodable"),
        ({"image": "data:image/svg+xml,<svg/>", "text": "t"}, "image_undecodable"),
        ({"image": 7, "text": "t"}, "schema"),
        ({"image": B64, "text": 7}, "schema"),
        ({"image": B64, "text": "t", "colour": "\ud800"}, "schema"),
        ({"image": B64, "text": "t", "time": "0001-01-01T00:00:00+14:00"}, "schema"),
        ({"image": B64, "text": "\ud800"}, "schema"),
        ({"image": B64, "text": "t", "time": "yesterday"}, "schema"),
        ({"image": B64, "text": "t", "tags": ["a"] * 33}, "schema"),
        ({"image": B64, "text": "t", "schema": "ratchet.sample.v2"}, "schema"),
        ({"image": B64, "text": "t", "schema": "ratchet.sample.v11"}, "schema"),
        ({"image": B64, "text": "t", "schema": "ratchet.sample.v1.x"}, "schema"),
        ({"image": B64, "text": "t", "schema": 1}, "schema"),
        ({"image": B64, "image_uri": "file:///x", "text": "t"}, "schema"),
        ({"image_uri": "file:///etc/passwd", "text": "t"}, "uri_not_allowed"),
        ({"image": "A" * 40_000_000, "text": "t"}, "image_too_large"),
        ({"specversion": "1.0", "type": "other", "source": "s", "id": "1"}, "schema"),
        ({"specversion": "1.0", "type": SCHEMA, "source": "s", "id": "1", "data": "text"}, "schema"),
        ({"specversion": "1.0", "type": SCHEMA, "id": "1", "data": {}}, "schema"),
        ([1, 2], "not_json"),
    ],
)
def test_a_bad_record_is_refused_with_its_reason(record: Any, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode(json.dumps(record).encode())
    assert caught.value.reason == reason
    assert caught.value.fix


@pytest.mark.parametrize("name", ["text", "question", "answer"])
def test_long_texts_are_refused(name: str) -> None:
    sample = Sample(image=PNG, **{"text": "t", name: "x" * 11})
    with pytest.raises(RecordError, match=name) as caught:
        check_text(sample, 10)
    assert caught.value.reason == "text_too_long"
    check_text(sample, 11)


EVENT = {"specversion": "1.0", "type": SCHEMA, "source": "urn:cam", "id": "1"}


def read(record: dict[str, Any], *headers: tuple[str, bytes]) -> Sample:
    return decode(json.dumps({"image": B64, "text": "t", **record}).encode(), headers)


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth - 1):
        value = [value]
    return value


def test_unknown_keys_of_a_json_record_are_kept() -> None:
    sample = read({"colour": "red", "boxes": [{"x": 1.5}], "Text": "T", "none": None, "schema": f"{SCHEMA}.7"})
    assert sample.extra == {"colour": "red", "boxes": [{"x": 1.5}], "Text": "T", "none": None}
    assert sample.text == "t"


def test_unknown_headers_are_kept_under_the_name_that_they_have() -> None:
    sample = decode(PNG, [("Ratchet_Text", b"t"), ("ratchet_Colour", b"red"), ("ratchet_grün", b"1"), ("trace", b"x")])
    assert (sample.text, sample.extra) == ("t", {"Colour": "red", "grün": "1"})


def test_extensions_of_an_event_that_are_not_ours_are_kept() -> None:
    binary = [(f"ce_{name}", text.encode()) for name, text in EVENT.items()]
    headers = [*binary, ("ce_traceparent", b"00-1"), ("ce_text", b"t"), ("ce_subject", b"7"), ("ce_dataschema", b"s")]
    assert decode(PNG, headers).extra == {"traceparent": "00-1", "subject": "7"}
    event = {**EVENT, "traceparent": "00-2", "data": {"image": B64, "text": "t", "colour": "red"}}
    assert decode(json.dumps(event).encode()).extra == {"traceparent": "00-2", "colour": "red"}


def test_a_header_counts_more_than_the_record_and_that_more_than_its_event() -> None:
    event = {**EVENT, "a": 1, "b": 1, "c": 1, "data": {"image": B64, "text": "t", "b": 2, "c": 2}}
    assert decode(json.dumps(event).encode(), [("ratchet_c", b"3")]).extra == {"a": 1, "b": 2, "c": "3"}


def test_headers_of_the_quarantine_topic_are_no_fields_of_a_record_that_is_sent_again() -> None:
    names = ("reason", "detail", "topic", "partition", "offset", "refused_at")
    assert read({}, *((f"ratchet_{name}", b"1") for name in names)).extra == {}
    assert read({}, ("ratchet_topic", b"boats")).extra == {"topic": "boats"}


@pytest.mark.parametrize("name", ["image", "image_uri", "IMAGE"])
def test_an_image_in_a_header_is_refused(name: str) -> None:
    with pytest.raises(RecordError, match=name.lower()) as caught:
        decode(PNG, [("ratchet_text", b"t"), (f"ratchet_{name}", b"x")])
    assert caught.value.reason == "headers"


@pytest.mark.parametrize("schema", [b"ratchet.sample.v1", b"ratchet.sample.v1.12"])
def test_a_minor_version_is_read_and_a_major_one_refused_in_headers_too(schema: bytes) -> None:
    assert decode(PNG, [("ratchet_text", b"t"), ("ratchet_schema", schema)]).text == "t"
    event = [(f"ce_{name}", text.encode()) for name, text in {**EVENT, "text": "t", "type": schema.decode()}.items()]
    assert decode(PNG, event).text == "t"
    with pytest.raises(RecordError, match="v2"):
        decode(PNG, [("ratchet_text", b"t"), ("ratchet_schema", b"ratchet.sample.v2")])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({f"f{number}": 1 for number in range(MAX_FIELDS + 1)}, f"f{MAX_FIELDS}"),
        ({"small": 1, "large": "x" * MAX_BYTES}, "large"),
        ({"wide": [{}] * MAX_BYTES}, "wide"),
        ({"a": "x" * 9000, "b": "x" * 9000}, "b"),
        ({"escaped": "ä" * (MAX_BYTES // 4)}, "escaped"),
        ({"deep": nested(MAX_DEPTH + 1)}, "deep"),
        ({"deep": nested(900)}, "deep"),
        ({"half": "\ud800"}, "half"),
        ({"half\ud800": 1}, "half"),
        ({"nest": {"\udfff": 1}}, "nest"),
        ({"x" * 257: 1}, "xxx"),
        ({"": 1}, "''"),
    ],
)
def test_a_field_over_a_bound_is_refused_by_its_name(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(RecordError, match=named) as caught:
        read(extra)
    assert caught.value.reason == "schema"
    str(caught.value).encode()


# -- digests: an image that is not the one that was meant is refused, however it comes -------------------------------

DIGEST = "sha256:" + hashlib.sha256(PNG).hexdigest()


def fetched(**fields: Any) -> bytes:
    return decode(json.dumps({"text": "a boat", **fields}).encode(), fetch=lambda uri: PNG).image


@pytest.mark.parametrize("fields", [{"image": B64}, {"image_uri": "https://cdn.test/a"}])
def test_a_record_states_the_digest_of_its_image(fields: dict[str, str]) -> None:
    assert fetched(**fields, image_digest=DIGEST) == fetched(**fields) == PNG
    for digest, reason in (("sha256:" + "0" * 64, "uri_digest"), ("sha256:0", "schema"), (5, "schema"), ("", "schema")):
        with pytest.raises(RecordError) as caught:
            fetched(**fields, image_digest=digest)
        assert caught.value.reason == reason


def test_both_algorithms_of_oci_are_known() -> None:
    assert fetched(image=B64, image_digest="sha512:" + hashlib.sha512(PNG).hexdigest()) == PNG
    with pytest.raises(RecordError, match="states sha512:000000000000"):
        fetched(image=B64, image_digest="sha512:" + "0" * 128)
