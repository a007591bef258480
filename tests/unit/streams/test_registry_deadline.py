"""A schema at which the registry fails for too long is given up; a registry that is away is waited for."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest

from core.errors import RecordError, RegistryUnavailable, SchemaUnavailable
from streams.records import registry as module
from streams.records import registry_client
from streams.records.codecs import decode
from streams.records.registry import DEADLINE_SECONDS, FORGET_SECONDS, SchemaRegistry
from tests.support.kafka import picture
from tests.support.registry import Registry, running

VALUE = json.dumps({"image": base64.b64encode(picture(1)).decode(), "text": "t"}).encode()


class Clock:
    """The registry's clock, which a test moves on."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(registry_client, "TRIES", 1)
    monkeypatch.setattr(module, "AWAY_SECONDS", 0.0)
    return made


@pytest.fixture
def server() -> Iterator[Registry]:
    with running(Registry()) as registry:
        for title in ("one", "two"):
            registry.register(title, {"schema": json.dumps({"title": title}), "schemaType": "JSON"})
        registry.broken = {1}
        yield registry


@pytest.fixture
def registry(server: Registry, clock: Clock) -> Iterator[SchemaRegistry]:
    made = SchemaRegistry(server.url)
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
    server: Registry, registry: SchemaRegistry, clock: Clock
) -> None:
    fail(registry, clock, DEADLINE_SECONDS)
    with pytest.raises(RecordError) as caught:
        read(registry)
    assert caught.value.reason == "schema_unavailable" and "ratchet quarantine resubmit" in caught.value.fix
    calls = len(server.calls)
    with pytest.raises(RecordError):
        read(registry)
    assert len(server.calls) == calls, "the next record does not ask at once"
    server.broken = set()
    clock.now += module.REFUSED_SECONDS + 1
    assert read(registry) == "t"


def test_a_registry_that_does_not_answer_is_waited_for(clock: Clock) -> None:
    with running(Registry()) as server:
        pass  # the port is free again
    registry = SchemaRegistry(server.url)
    fail(registry, clock, 2 * DEADLINE_SECONDS)
    registry.close()


def test_one_that_refuses_us_is_waited_for(server: Registry, registry: SchemaRegistry, clock: Clock) -> None:
    server.always = (401, b"{}")
    fail(registry, clock, 2 * DEADLINE_SECONDS)


def test_failures_that_lie_far_apart_do_not_add_up(registry: SchemaRegistry, clock: Clock) -> None:
    for _ in range(5):
        with pytest.raises(SchemaUnavailable):
            read(registry)
        clock.now += FORGET_SECONDS + DEADLINE_SECONDS


def test_what_succeeds_in_between_begins_the_deadline_again(
    server: Registry, registry: SchemaRegistry, clock: Clock
) -> None:
    fail(registry, clock, DEADLINE_SECONDS - 10)
    server.broken = set()
    assert read(registry) == "t"
    registry._decoders.clear()
    server.broken = {1}
    fail(registry, clock, DEADLINE_SECONDS - 10)
