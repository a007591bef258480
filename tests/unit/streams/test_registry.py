from __future__ import annotations

import base64
import io
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import pytest
from fastavro import schemaless_writer

from core.addresses import free_port
from core.errors import BrokerError, RecordError, RegistryUnavailable, SchemaUnavailable
from core.settings.streams import Kafka
from ratchet_client.records import Sample
from streams.records import registry as module
from streams.records import registry_client
from streams.records.codecs import decode
from streams.records.registry import DEADLINE_SECONDS, FORGET_SECONDS, SchemaRegistry
from tests.support.clock import Clock
from tests.support.confluent import AVRO, message_types, write_avro, write_json, write_protobuf
from tests.support.kafka import picture
from tests.support.registry import Registry, running
from tests.support.web_server import web_server
from tests.unit.streams.conftest import stop_clock

PNG = picture(1)
B64 = base64.b64encode(PNG).decode()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry_client, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(module, "AWAY_SECONDS", 0.0)


@pytest.fixture
def server() -> Iterator[Registry]:
    with running(Registry()) as registry:
        yield registry


@pytest.fixture
def registry(server: Registry) -> Iterator[SchemaRegistry]:
    with closing(SchemaRegistry(server.url)) as opened:
        yield opened


def framed(number: int, payload: bytes) -> bytes:
    return b"\0" + number.to_bytes(4, "big") + payload


def add(server: Registry, schema: Any, kind: str = "AVRO", **more: Any) -> int:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    return server.register("subject", {"schema": text, "schemaType": kind, **more})


def reason(value: bytes, registry: SchemaRegistry | None) -> str:
    with pytest.raises(RecordError) as caught:
        decode(value, registry=registry)
    assert caught.value.fix
    return caught.value.reason


def test_avro_and_json_by_the_official_serializers(server: Registry, registry: SchemaRegistry) -> None:
    record = {"image": PNG, "text": "a boat", "question": None, "tags": ["a"], "time": datetime(2026, 1, 2, tzinfo=UTC)}
    value = write_avro(server.url, {**record, "boxes": [{"x": 0.5}], "thumbnail": b"\1"})
    sample = decode(value, [("ratchet_domain", b"sea")], registry=registry)
    assert (sample.image, sample.text, sample.question, sample.tags) == (PNG, "a boat", "", ("a",))
    assert (sample.time, sample.domain) == (datetime(2026, 1, 2, tzinfo=UTC), "sea")
    assert sample.extra == {"boxes": [{"x": 0.5}], "thumbnail": "AQ=="}
    value = write_avro(server.url, PNG, "bytes")
    assert decode(value, [("ratchet_text", b"t")], registry=registry).image == PNG
    value = write_json(server.url, {"image": B64, "text": "a boat", "colour": "red"})
    assert decode(value, registry=registry) == Sample(image=PNG, text="a boat", extra={"colour": "red"})


def test_protobuf_by_the_official_serializer(server: Registry, registry: SchemaRegistry) -> None:
    message = message_types()["Sample"](image=PNG, text="a boat", tags=["a", "b"])
    message.time.FromDatetime(datetime(2026, 1, 2, tzinfo=UTC))
    message.boxes.add(x=0.5, count=2**60)
    message.extra.update({"colour": "red"})
    sample = decode(write_protobuf(server.url, message), registry=registry)
    assert (sample.image, sample.text, sample.tags) == (PNG, "a boat", ("a", "b"))
    assert sample.time == datetime(2026, 1, 2, tzinfo=UTC)
    assert sample.extra == {"colour": "red", "boxes": [{"x": 0.5, "count": str(2**60)}]}
    value = write_protobuf(server.url, message_types()["Inner"](image=B64, text="a boat"))
    assert value[5:8] == b"\x04\x02\x02"  # two indexes, each the second of its kind
    assert decode(value, registry=registry).image == PNG
    message = message_types()["Sample"](image=PNG, text="x" * 600_000)
    assert reason(write_protobuf(server.url, message), registry) == "schema", "fields beside the image are bounded"
    message = message_types()["Sample"](image=b"x" * 600_000, text="t")
    assert len(registry.read(write_protobuf(server.url, message))["image"]) == 600_000


def test_user_and_password_are_sent_and_never_shown(server: Registry) -> None:
    settings = Kafka(schema_registry=server.url, schema_registry_auth="us:hush")  # type: ignore[arg-type]
    registry = SchemaRegistry.of(settings)
    assert registry is not None
    server.always = (401, b'{"error_code": 401}')
    with pytest.raises(RegistryUnavailable, match="schema_registry_auth") as caught:
        registry.read(framed(1, b"x"))
    assert server.headers[0]["authorization"] == "Basic " + base64.b64encode(b"us:hush").decode()
    assert "hush" not in str(caught.value) + repr(settings)
    assert SchemaRegistry.of(Kafka()) is None
    assert reason(framed(1, b"x"), None) == "schema"


def test_an_unknown_id_or_a_schema_that_is_too_large_is_a_refusal(server: Registry, registry: SchemaRegistry) -> None:
    assert [reason(framed(7, b"x"), registry) for _ in range(3)] == ["schema"] * 3
    assert server.calls == ["GET /schemas/ids/7"], "it is not asked for again at once"
    server.always = (200, b" " * (registry_client.MAX_RESPONSE_BYTES + 1))
    assert reason(framed(1, b"x"), registry) == "schema"
    server.calls.clear()
    assert reason(framed(registry_client.MAX_ID + 1, b"x"), registry) == "schema"
    assert server.calls == [], "none can have this id"


@pytest.mark.parametrize(
    "answer",
    [
        (500, b"{}"),
        (200, b"<html>"),
        (200, b'{"schema": "x", "references": 7}'),
        (200, b"[" * 100_000),
        (302, b"{}"),
        (404, b'{"error_code": 404, "message": "HTTP 404 Not Found"}'),
    ],
    ids=lambda answer: f"{answer[0]}-{answer[1][:12]!r}",
)
def test_a_registry_that_answers_nonsense_is_an_outage(
    server: Registry, registry: SchemaRegistry, answer: tuple[int, bytes]
) -> None:
    value = framed(add(server, {"type": "object"}, "JSON"), json.dumps({"image": B64, "text": "t"}).encode())
    server.always = answer
    with pytest.raises(RegistryUnavailable, match=server.url) as caught:
        decode(value, registry=registry)
    assert isinstance(caught.value, BrokerError) and "kafka.schema_registry" in caught.value.fix
    server.always = None
    assert decode(value, registry=registry).text == "t"


def silent(wire: socket.socket) -> None:
    wire.recv(1)


@pytest.mark.parametrize("begins", [True, False])
def test_a_registry_that_does_not_begin_or_end_its_answer_is_an_outage(begins: bool) -> None:
    with web_server() as web:
        web.pages["/schemas/ids/1"] = web.endless(b" ", 0.02) if begins else silent
        with closing(SchemaRegistry(f"http://{web.host}:{web.port}", timeout_seconds=0.3)) as registry:
            with pytest.raises(RegistryUnavailable, match="Timeout"):
                registry.read(framed(1, b"x"))
            assert not begins or web.hung_up.wait(20)


RECURSIVE = {"type": "record", "name": "N", "fields": [{"name": "next", "type": ["null", "N"]}]}
DEEP: Any = "int"
for _ in range(400):
    DEEP = {"type": "array", "items": DEEP}
WIDE: Any = "int"
for level in range(24):
    fields = [{"name": "a", "type": WIDE}, {"name": "b", "type": WIDE if level == 0 else f"R{level - 1}"}]
    WIDE = {"type": "record", "name": f"R{level}", "fields": fields}


UNSAFE: list[tuple[Any, bytes]] = [
    (RECURSIVE, b"\x02" * 1_000_000),  # ends the process when fastavro reads it
    ({"type": "array", "items": "null"}, b"\xfe\xff\xff\xff\xff\xff\xff\xff\x7f"),
    ({"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}}, b"\xfe\xff\xff\xff\x7f"),
    (DEEP, b"\x02" * 400),
    (WIDE, b"\x02" * 400),
    ({"type": "map", "values": "bytes"}, b"\x02\x0aimage\x02\x41\x00tail"),
    ("not a type", b"x"),
]
IMPORTS = base64.b64encode(b"\x0a\x01a\x1a\x09gone.proto").decode()


def test_what_cannot_be_read_safely_by_its_schema_is_refused(server: Registry, registry: SchemaRegistry) -> None:
    for schema, payload in UNSAFE:
        assert reason(framed(add(server, schema), payload), registry) == "schema", str(schema)[:200]
    sound = write_protobuf(server.url, message_types()["Sample"](image=PNG, text="t"))
    for payload in (b"", b"\x80", b"\x02\x7e", b"\x00\x0a\xff\x01"):
        assert reason(sound[:5] + payload, registry) == "schema", payload
    for text, *subjects in (('syntax = "proto3";',), ("AAAA",), (IMPORTS,), (IMPORTS, "nowhere"), (IMPORTS, "subject")):
        references = [{"name": "gone.proto", "subject": subject, "version": 1} for subject in subjects]
        unusable = add(server, text, "PROTOBUF", references=references)
        assert reason(framed(unusable, b"\0x"), registry) == "schema", (text, subjects)


# -- a schema at which the registry fails for too long -------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(registry_client, "TRIES", 1)
    return stop_clock(monkeypatch, module)


@pytest.fixture
def broken(server: Registry) -> Registry:
    add(server, {"title": "one"}, "JSON")
    server.broken = {1}
    return server


def read(registry: SchemaRegistry) -> str:
    return decode(framed(1, json.dumps({"image": B64, "text": "t"}).encode()), registry=registry).text


def fail(registry: SchemaRegistry, clock: Clock, seconds: float) -> None:
    """The consumer retries, and it is an outage each time."""
    tries = max(6, int(seconds / 100))
    for _ in range(tries):
        with pytest.raises(RegistryUnavailable):
            read(registry)
        clock.now += seconds / tries


def test_a_schema_that_fails_for_the_deadline_is_given_up_and_found_again_when_it_is_there(
    broken: Registry, registry: SchemaRegistry, clock: Clock
) -> None:
    fail(registry, clock, DEADLINE_SECONDS)
    with pytest.raises(RecordError) as caught:
        read(registry)
    assert caught.value.reason == "schema_unavailable" and "ratchet quarantine resubmit" in caught.value.fix
    calls = len(broken.calls)
    with pytest.raises(RecordError):
        read(registry)
    assert len(broken.calls) == calls, "the next record does not ask at once"
    broken.broken = set()
    clock.now += module.REFUSED_SECONDS + 1
    assert read(registry) == "t"


def test_one_that_does_not_answer_or_refuses_us_is_waited_for_and_failures_far_apart_do_not_add_up(
    broken: Registry, registry: SchemaRegistry, clock: Clock
) -> None:
    for _ in range(5):
        with pytest.raises(SchemaUnavailable):
            read(registry)
        clock.now += FORGET_SECONDS + DEADLINE_SECONDS
    for _ in range(2):
        fail(registry, clock, DEADLINE_SECONDS - 10)
        broken.broken = set()
        assert read(registry) == "t", "nor do failures before and after a success"
        registry._decoders.clear()
        broken.broken = {1}
    broken.always = (401, b"{}")
    fail(registry, clock, 2 * DEADLINE_SECONDS)
    with closing(SchemaRegistry(f"http://127.0.0.1:{free_port()}")) as away:
        fail(away, clock, 2 * DEADLINE_SECONDS)


def test_an_avro_schema_may_import_others(server: Registry, registry: SchemaRegistry) -> None:
    box = {"type": "record", "name": "Box", "namespace": "org.example", "fields": [{"name": "x", "type": "int"}]}
    server.register("box", {"schema": json.dumps(box)})
    schema = {**AVRO, "fields": [*AVRO["fields"][:2], {"name": "box", "type": "org.example.Box"}]}
    number = add(server, schema, references=[{"name": "org.example.Box", "subject": "box", "version": 1}])
    assert reason(framed(number, b"\xf2\x02"), registry) == "schema", "not the length of the picture"
    whole, payload = {**AVRO, "fields": [*AVRO["fields"][:2], {"name": "box", "type": box}]}, io.BytesIO()
    schemaless_writer(payload, whole, {"image": PNG, "text": "t", "box": {"x": 5}})
    assert decode(framed(number, payload.getvalue()), registry=registry).extra == {"box": {"x": 5}}
