"""What a newer producer sends is kept within bounds, and is no part of what is learned from."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from core.errors import RecordError
from ratchet_client.encoding import encode
from ratchet_client.extra import MAX_BYTES, MAX_DEPTH, MAX_FIELDS, dump_extra
from ratchet_client.records import FIELDS, SCHEMA, Sample
from streams.records.codecs import decode
from tests.support.kafka import picture

PNG = picture(1)
B64 = base64.b64encode(PNG).decode()
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


def test_extra_is_no_part_of_the_id_and_one_column_of_the_row() -> None:
    plain, more = Sample(image=PNG, text="t", tags=("a",)), Sample(image=PNG, text="t", extra={"b": 1, "a": "é"})
    assert plain.id == more.id
    assert (plain.row()["extra"], plain.row()["tags"]) == ("", ["a"])
    assert more.row()["extra"] == '{"a":"\\u00e9","b":1}' == dump_extra(more.extra)
    assert set(more.row()) == set(FIELDS)
    assert len({plain, more}) == 2


@pytest.mark.parametrize("encoding", ["json", "raw", "cloudevents", "cloudevents-binary"])
def test_names_that_mean_something_elsewhere_come_through(encoding: Any) -> None:
    names = ("image", "Text", "specversion", "payload", "schema", "extra", "reason", "offset", "refused_at", "ce_id")
    sample = Sample(image=PNG, text="t", extra=dict.fromkeys(names, "x"))
    message = encode(sample, encoding)
    assert decode(message.value, message.headers) == sample
