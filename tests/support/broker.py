"""The broker of the tests: the embedded one, or the one of RATCHET_TEST_KAFKA (``apache``, or host:port)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from core.settings import Settings
from streams.kafka.broker import EmbeddedBroker


@dataclass(frozen=True)
class Broker:
    address: str
    embedded: bool

    def settings(
        self, home: Path, kafka: dict[str, Any] | None = None, ingest: dict[str, Any] | None = None, **sections: Any
    ) -> Settings:
        """Settings with new topics and a new group, small batches, and one validating process, since starting a process
        takes longer than validating what most tests send.
        """
        name = uuid.uuid4().hex[:8]
        own = {
            "bootstrap": self.address,
            "topic": f"samples-{name}",
            "quarantine_topic": f"quarantine-{name}",
            "group": f"ingest-{name}",
            "batch_seconds": 0.2,
        }
        validated = {"processes": 1, **(ingest or {})}
        return Settings(home=home, kafka={**own, **(kafka or {})}, ingest=validated, **sections)


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Iterator[Broker]:
    named = getattr(request, "param", os.environ.get("RATCHET_TEST_KAFKA", "embedded"))
    if named == "embedded":
        with EmbeddedBroker() as started:
            yield Broker(started.address, embedded=True)
    elif named == "apache":
        yield Broker(request.getfixturevalue("apache_kafka").address, embedded=False)
    else:
        yield Broker(named, embedded=False)
