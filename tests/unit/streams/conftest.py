"""Fixtures of the tests of streams."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.settings import Settings
from streams.ingest import consumer
from streams.store.sample_store import SampleStore
from tests.support.fake_kafka import FakeKafka, install


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return SampleStore(str(tmp_path / "lake"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    kafka = {"topic": "t", "batch_seconds": 0.02, "bootstrap": "127.0.0.1:1"}
    return Settings(home=tmp_path, kafka=kafka, ingest={"processes": 2})


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> FakeKafka:
    """A broker in memory, which every consumer reads."""
    broker = FakeKafka("t")
    install(broker, monkeypatch)
    monkeypatch.setattr(consumer, "BACKOFF_SECONDS", (0.02,))
    monkeypatch.setattr("streams.ingest.quarantine.BACKOFF_SECONDS", (0.02,))
    monkeypatch.setattr("streams.ingest.membership.LOOK_SECONDS", 0.0)
    return broker
