from __future__ import annotations

import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from core.ledger import Ledger
from core.settings import Settings
from streams.ingest import consumer
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support import consumer as support
from tests.support.clock import Clock
from tests.support.fake_kafka import FakeKafka, install


@pytest.fixture
def store(tmp_path: Path) -> SampleStore:
    return SampleStore(str(tmp_path / "lake"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    kafka = {"topic": "t", "batch_seconds": 0.02, "bootstrap": "127.0.0.1:1"}
    return Settings(home=tmp_path, kafka=kafka, ingest={"processes": 2})


@pytest.fixture
def ledger(settings: Settings) -> Iterator[Ledger]:
    with closing(Ledger.open(settings.ledger)) as opened:
        yield opened


@pytest.fixture
def kafka(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeKafka:
    """An in-memory broker for every consumer; its parameter is the number of partitions."""
    broker = FakeKafka("t", getattr(request, "param", 1))
    install(broker, monkeypatch)
    monkeypatch.setattr(consumer, "BACKOFF_SECONDS", (0.02,))
    monkeypatch.setattr("streams.ingest.quarantine.BACKOFF_SECONDS", (0.02,))
    monkeypatch.setattr("streams.ingest.membership.LOOK_SECONDS", 0.0)
    return broker


@dataclass
class Ingestion:
    """One store, and the ingests that fill it from the in-memory broker one after another."""

    settings: Settings
    store: SampleStore

    def run(self, wanted: int = 0) -> AbstractContextManager[consumer.Consumer]:
        """Run an ingest during the block, which begins when it has dealt with ``wanted`` records."""
        return support.run(self.settings, wanted)

    def finish(self, wanted: int) -> None:
        with self.run(wanted):
            pass

    def wait_for(self, count: int) -> None:
        """Wait until this many records are stored."""
        support.seen(self.store, count)

    def rows(self) -> list[tuple[str, int, str]]:
        return support.rows(self.store)

    def kinds(self) -> list[str]:
        """Kinds of the rows, which are those of the topic's offsets from 0 on."""
        rows = self.rows()
        assert [row[:2] for row in rows] == [("t", offset) for offset in range(len(rows))]
        return [kind for *_, kind in rows]

    def position(self) -> Position:
        return self.store.positions()["t:0"]


@pytest.fixture
def ingestion(settings: Settings, store: SampleStore, kafka: FakeKafka) -> Ingestion:
    return Ingestion(settings, store)


Outage = Callable[..., threading.Event]


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    """Makes a method or function raise an error while the returned event is set, which it is at first."""

    def begin(owner: Any, name: str, error: Exception, of: Callable[..., bool] = lambda *_: True) -> threading.Event:
        away, real = threading.Event(), getattr(owner, name)
        away.set()

        def call(*args: Any, **options: Any) -> Any:
            if away.is_set() and of(*args):
                raise error
            return real(*args, **options)

        monkeypatch.setattr(owner, name, call)
        return away

    return begin


@pytest.fixture(scope="session")
def img2dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that img2dataset 1.47.0 wrote of four URLs of a local server, one of which answered 404, with
    ``--output_format`` webdataset, parquet and files (``--resize_mode no --image_size 32 --caption_col caption``).

    It pins versions that Ratchet does not run with, so its output is committed.
    """
    folder = tmp_path_factory.mktemp("img2dataset")
    with tarfile.open(Path(__file__).with_name("img2dataset.tar.xz")) as tar:
        tar.extractall(folder, filter="data")
    return folder


def stop_clock(monkeypatch: pytest.MonkeyPatch, module: Any) -> Clock:
    """A clock for ``module`` that a test moves."""
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock))
    return clock
