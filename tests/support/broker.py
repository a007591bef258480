"""The broker that tests talk to: the embedded one, or the one that RATCHET_TEST_KAFKA=host:port names."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ops.settings import Settings
from streams.broker import EmbeddedBroker


@dataclass(frozen=True)
class Broker:
    """A running broker."""

    address: str
    embedded: bool

    def settings(
        self, home: Path, kafka: dict[str, Any] | None = None, ingest: dict[str, Any] | None = None, **sections: Any
    ) -> Settings:
        """Settings with topics and a group of their own, quick small batches, and one process that validates.

        To start a process takes longer than to validate what most tests send.
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
def broker() -> Iterator[Broker]:
    """Started once for all tests, on a free port."""
    named = os.environ.get("RATCHET_TEST_KAFKA")
    if named:
        yield Broker(named, embedded=False)
        return
    with EmbeddedBroker() as started:
        yield Broker(started.address, embedded=True)
