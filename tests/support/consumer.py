"""A consumer on an in-memory broker, and the rows that it has stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import REGISTRY

from core.settings import Settings
from streams.ingest.consumer import Consumer
from streams.store.sample_store import SampleStore
from tests.support.kafka import Message, reading, records_seen, wait_for

POISON: Message = (b"poison", [])


@contextmanager
def run(settings: Settings, wanted: int = 0) -> Iterator[Consumer]:
    with reading(settings) as consumer:
        wait_for(lambda: records_seen(consumer.status) >= wanted, f"{wanted} records", 20)
        yield consumer


def rows(store: SampleStore) -> list[tuple[str, int, str]]:
    return [(row["topic"], row["offset"], row["kind"]) for row in store.records().to_pylist()]


def metric(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"ratchet_ingest_{name}", labels)


def dependency_state(name: str) -> str | None:
    states = {each: REGISTRY.get_sample_value("ratchet_dependency_state", {"dependency": name, "state": each})
              for each in ("ok", "away", "slow", "refused", "full")}  # fmt: skip
    return next((state for state, value in states.items() if value), None)


def seen(store: SampleStore, count: int) -> None:
    wait_for(
        lambda: sum(store.tally()[kind] for kind in ("sample", "duplicate", "quarantine")) >= count, f"{count}", 20
    )
