"""A schema at which the registry fails for too long is given up; a registry that is away is waited for."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest

from core.errors import RecordError, RegistryUnavailable, SchemaUnavailable
from streams.records.codecs import decode
from streams.records.registry import SchemaRegistry, client, decoders
from tests.support.clock import Clock
from tests.support.kafka import picture
from tests.support.registry import Registry, running

VALUE = json.dumps({"image": base64.b64encode(picture(1)).decode(), "text": "t"}).encode()
DEADLINE = 600.0


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "TRIES", 1)
    monkeypatch.setattr(decoders, "AWAY_SECONDS", 0.0)


@pytest.fixture
def server() -> Iterator[Registry]:
    with running(Registry()) as registry:
        for title in ("one", "two"):
            registry.register(title, {"schema": json.dumps({"title": title}), "schemaType": "JSON"})
        registry.broken = {1}
        yield registry


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def registry(server: Registry, clock: Clock) -> Iterator[SchemaRegistry]:
    made = SchemaRegistry(server.url, deadline_seconds=DEADLINE, clock=clock)
    yield made
    made.close()


def read(registry: SchemaRegistry, number: int = 1) -> str:
    return decode(b"\0" + number.to_bytes(4, "big") + VALUE, registry=registry).text


def fail(registry: SchemaRegistry, clock: Clock, seconds: float) -> None:
    """The consumer tries again and again, and it is an outage each time."""
    tries = max(6, int(seconds / 100))
    for _ in range(tries):
        with pytest.raises(RegistryUnavailable):
            read(registry)
        clock.now += seconds / tries


def test_a_schema_that_fails_for_the_deadline_is_given_up_and_found_again_when_it_is_there(
    server: Registry, registry: SchemaRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(registry, clock, DEADLINE)
    with pytest.raises(RecordError, match="failed 7 times in 600 s") as caught:
        read(registry)
    assert caught.value.reason == "schema_unavailable" and "ratchet quarantine resubmit" in caught.value.fix
    calls = len(server.calls)
    with pytest.raises(RecordError):
        read(registry)
    assert len(server.calls) == calls, "the next record does not ask at once"
    server.broken = set()
    monkeypatch.setattr(decoders.time, "monotonic", lambda: float("inf"))
    assert read(registry) == "t"


def test_a_tenth_of_it_is_enough_where_another_schema_can_be_read(
    server: Registry, registry: SchemaRegistry, clock: Clock
) -> None:
    assert read(registry, 2) == "t"
    fail(registry, clock, DEADLINE / 10)
    asked = len(server.calls)
    with pytest.raises(RecordError) as caught:
        read(registry)
    assert caught.value.reason == "schema_unavailable"
    assert "GET /schemas/ids/2" in server.calls[asked:], "it is asked now, not remembered"


def test_while_nothing_can_be_read_a_schema_is_not_given_up_early(
    server: Registry, registry: SchemaRegistry, clock: Clock
) -> None:
    assert read(registry, 2) == "t"
    server.broken = {1, 2}
    fail(registry, clock, DEADLINE)
    with pytest.raises(RecordError):
        read(registry)


def test_a_registry_that_does_not_answer_is_waited_for(clock: Clock) -> None:
    with running(Registry()) as server:
        pass  # the port is free again
    registry = SchemaRegistry(server.url, deadline_seconds=DEADLINE, clock=clock)
    fail(registry, clock, 2 * DEADLINE)
    registry.close()


def test_one_that_refuses_us_is_waited_for(server: Registry, registry: SchemaRegistry, clock: Clock) -> None:
    server.always = (401, b"{}")
    fail(registry, clock, 2 * DEADLINE)


def test_without_a_deadline_it_is_waited_for(server: Registry, clock: Clock) -> None:
    registry = SchemaRegistry(server.url, deadline_seconds=0.0, clock=clock)
    assert read(registry, 2) == "t"
    fail(registry, clock, 2 * DEADLINE)
    registry.close()


def test_failures_that_lie_far_apart_do_not_add_up(registry: SchemaRegistry, clock: Clock) -> None:
    for _ in range(5):
        with pytest.raises(SchemaUnavailable):
            read(registry)
        clock.now += decoders.FORGET_SECONDS + DEADLINE


def test_what_succeeds_in_between_begins_the_deadline_anew(
    server: Registry, registry: SchemaRegistry, clock: Clock
) -> None:
    fail(registry, clock, DEADLINE - 10)
    registry._failing.succeeded(1)
    fail(registry, clock, DEADLINE - 10)


def test_failures_of_many_schemas_are_forgotten_beyond_a_bound() -> None:
    failures = decoders.FailingSchemas(DEADLINE)
    for number in range(decoders.MAX_FAILING + 10):
        failures.failed(number, SchemaUnavailable("away."), lambda: False)
    assert len(failures._failures) == decoders.MAX_FAILING
