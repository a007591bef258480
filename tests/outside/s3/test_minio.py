"""MinIO: its access rights, its error for a full disk, and the fate of records while it is killed and hangs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

from benchmarks.stream.small_disk import SmallDisk
from core.dependencies import Dependency, DependencyState, current
from core.settings import Settings
from ops import dependency_checks
from ops.dependency_checks import look
from streams.store.sample_store import SampleStore
from tests.support.downloads import started
from tests.support.environment import variables
from tests.support.fake_kafka import FakeKafka, install
from tests.support.kafka import good, reading, wait_for
from tests.support.minio import MinIO

pytestmark = [pytest.mark.s3, pytest.mark.timeout(2400)]
BUCKET = "models"
STORES: tuple[Dependency, ...] = ("store", "artifacts")
RECORDS = 400


@pytest.fixture(scope="module")
def shared() -> Iterator[MinIO]:
    with started("MinIO", MinIO) as server:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield server


@pytest.fixture
def minio(shared: MinIO) -> Iterator[MinIO]:
    """MinIO, started once, with an empty bucket for all tests."""
    S3FileSystem.clear_instance_cache()
    yield shared
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> FakeKafka:
    broker = FakeKafka("t")
    install(broker, monkeypatch)
    return broker


def settings_of(home: Path) -> Settings:
    stores = {"lake_url": f"s3://{BUCKET}/{home.name}", "artifacts_url": f"s3://{BUCKET}/{home.name}-artifacts"}
    kafka = {"topic": "t", "batch_seconds": 0.05, "batch_records": 8, "bootstrap": "127.0.0.1:1"}
    return Settings.model_validate({"home": home, **stores, "kafka": kafka})


def store_state() -> str:
    """The store state that this process noted last; none before it has used a store."""
    noted = current().get("store")
    return noted.state if noted else ""


def states(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> dict[Dependency, DependencyState]:
    """States of the two stores in MinIO as seen by ``ratchet doctor``, without the broker."""
    monkeypatch.setattr(dependency_checks, "_broker", lambda settings: "answers")
    S3FileSystem.clear_instance_cache()
    found = look(settings, write=True)
    return {name: found[name] for name in STORES}


@pytest.mark.parametrize(
    ("action", "told"),
    [
        ("s3:GetObject", "cannot be read: "), ("s3:PutObject", "cannot be written: "),
        ("s3:DeleteObject", "cannot be deleted from: "), ("s3:*", "cannot be read: "),
    ],
)  # fmt: skip
def test_a_right_that_a_policy_denies_is_named(
    minio: MinIO, action: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tmp_path)
    with minio.without(action):
        for state in states(settings, monkeypatch).values():
            assert state.state == "refused" and told in state.detail, state
    assert {each.state for each in states(settings, monkeypatch).values()} == {"ok"}


@pytest.mark.usefixtures("minio")
@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_keys_are_refused_and_not_shown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with variables({name: "not-the-one"}):
        for state in states(settings_of(tmp_path), monkeypatch).values():
            assert state.state == "refused", state
            assert "not-the-one" not in state.detail and os.environ["AWS_SECRET_ACCESS_KEY"] not in state.detail


def test_a_hanging_one_is_slow_a_killed_one_away(minio: MinIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependency_checks, "LOOK_SECONDS", 60.0)
    settings = settings_of(tmp_path)
    with minio.hanging():
        assert {each.state for each in states(settings, monkeypatch).values()} == {"slow"}
    minio.kill()
    monkeypatch.setattr(dependency_checks, "CALL_SECONDS", 30.0)
    assert {each.state for each in states(settings, monkeypatch).values()} == {"away"}
    minio.start()
    assert {each.state for each in states(settings, monkeypatch).values()} == {"ok"}


def test_nothing_is_lost_or_stored_twice_when_killed_or_hanging(minio: MinIO, kafka: FakeKafka, tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    with reading(settings) as ingest:
        for trouble in range(4):
            sent = RECORDS // 4 * (trouble + 1)
            kafka.send(*(good(number) for number in range(sent - RECORDS // 4, sent)))
            wait_for(lambda n=sent: ingest.status.samples > n - 90, "a part of them")  # type: ignore[misc]
            if trouble % 2:
                with minio.hanging():
                    wait_for(lambda: store_state() not in ("", "ok"), "a word on the store that hangs", 300)
            else:
                minio.kill()
                wait_for(lambda: store_state() not in ("", "ok"), "a word on the store that is away", 300)
                minio.start()
            wait_for(lambda n=sent: ingest.status.samples >= n, "all of them", 300)  # type: ignore[misc]
    store = SampleStore(settings.lake)
    ids = store.scan(columns=["id"])["id"].to_pylist()
    assert len(ids) == len(set(ids)) == store.count() == RECORDS
    assert store.offsets() == {"t:0": RECORDS}


def test_a_full_disk_is_told_and_waited_for(kafka: FakeKafka, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(tmp_path)
    with SmallDisk(tmp_path / "disk", 2 << 30) as disk, started("MinIO", lambda: MinIO(disk.folder / "data")):
        if not disk.mounted:
            pytest.skip("no small disk can be mounted here; that takes root")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        with reading(settings) as ingest:
            kafka.send(*(good(number) for number in range(20)))
            wait_for(lambda: ingest.status.samples >= 20, "the first records")
            disk.fill()
            kafka.send(*(good(number) for number in range(20, 40)))
            wait_for(lambda: store_state() == "full", "a word on the full disk", 300)
            assert ingest.status.samples < 40
            disk.free()
            wait_for(lambda: ingest.status.samples >= 40, "the rest", 300)
            disk.fill()
            kafka.send(*(good(number) for number in range(40, 60)))
            wait_for(lambda: store_state() == "full", "a word on the disk that is full again", 300)
        assert SampleStore(settings.lake).count() == 40
        disk.free()
        with reading(settings) as ingest:
            wait_for(lambda: ingest.status.samples >= 20, "what waited for room", 300)
        assert SampleStore(settings.lake).count() == 60
        disk.fill()
        assert {each.state for each in states(settings, monkeypatch).values()} == {"full"}
    S3FileSystem.clear_instance_cache()
