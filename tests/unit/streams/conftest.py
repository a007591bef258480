"""Fixtures of the tests of streams."""

from __future__ import annotations

import tarfile
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


@pytest.fixture(scope="session")
def img2dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders that img2dataset 1.47.0 wrote of four URLs of a local server, one of which answered 404, with
    ``--output_format`` webdataset, parquet and files (``--resize_mode no --image_size 32 --caption_col caption``).

    It pins versions that Ratchet does not run with, so its output is kept rather than made here.
    """
    folder = tmp_path_factory.mktemp("img2dataset")
    with tarfile.open(Path(__file__).with_name("img2dataset.tar.xz")) as tar:
        tar.extractall(folder, filter="data")
    return folder
