"""Deletions in a bucket that keeps old versions of objects: they are deleted too, or the receipt says what remains."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest

from core.ledger import DeletionRow, Ledger
from core.settings import Settings
from core.waiting import wait_until
from streams.store import deletion, maintenance
from streams.store.deletion import OldVersions, as_json
from streams.store.maintenance import Maintainer
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.minio import MinIO
from tests.support.s3 import Moto, s3_server
from tests.support.samples import TOPIC, put, sample

SECRET = "the caption of somebody who withdrew"


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[Moto | MinIO]:
    with s3_server() as running:
        yield running


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "SETTLE_SECONDS", -1.0)
    monkeypatch.setattr(maintenance, "UNLOCK_SECONDS", 0.0)


class Installation:
    """A store in a new bucket that keeps versions, with one sample to be deleted, and maintenance."""

    def __init__(self, bucket: str, home: Path, lock: bool = False) -> None:
        self.bucket, self.s3 = bucket, boto3.client("s3")
        self.s3.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=lock)
        self.s3.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        kept = {"maintain": {"keep_seconds": 0}, "kafka": {"events_topic": ""}}
        self.settings = Settings.model_validate({"home": home, "lake_url": f"s3://{bucket}/lake", **kept})
        self.ledger = Ledger.open(self.settings.ledger)
        self.store = SampleStore(self.settings.lake)
        rows = [sample(0, n, source="cam" if n == 0 else "eye", text=SECRET if n == 0 else "a crane") for n in range(4)]
        put(self.store, rows, Position(TOPIC, 0, 4))
        self.maintainer = Maintainer(self.settings, self.ledger, self.store)
        self.name = deletion.request_deletion(self.ledger, {"source": "cam"}, actor="ann", reason="asked to").id

    def run(self, runs: int = 1) -> DeletionRow:
        for _ in range(runs):
            self.maintainer.run_once()
        found = self.ledger.deletion(self.name)
        assert found is not None
        return found

    def versions(self) -> list[dict[str, Any]]:
        pages = self.s3.get_paginator("list_object_versions").paginate(Bucket=self.bucket)
        return [each for page in pages for each in page.get("Versions", ())]

    def which(self, version: dict[str, Any]) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": version["Key"], "VersionId": version["VersionId"]}

    def lock(self, versions: list[dict[str, Any]], time: timedelta) -> datetime:
        until = datetime.now(UTC) + time
        retention = {"Mode": "GOVERNANCE", "RetainUntilDate": until}
        for each in versions:
            self.s3.put_object_retention(**self.which(each), Retention=retention, BypassGovernanceRetention=True)
        return until

    def versions_with_the_secret(self) -> list[str]:
        found = (self.which(each) for each in self.versions())
        return [each["Key"] for each in found if SECRET.encode() in self.s3.get_object(**each)["Body"].read()]


def test_old_versions_of_files_that_had_it_are_deleted_too(tmp_path: Path) -> None:
    here = Installation("versioned", tmp_path)
    assert here.versions_with_the_secret()
    row = here.run(3)
    assert (row.state, row.remains, row.held_at) == ("done", None, None)
    assert not here.versions_with_the_secret() and all(each["IsLatest"] for each in here.versions())
    assert here.store.count() == 3


def test_object_lock_holds_a_deletion_and_its_receipt_says_what_is_left_and_until_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Installation("locked", tmp_path, lock=True)
    before = here.versions()
    here.lock(before, timedelta(days=3))
    row = here.run(3)
    assert row.state == "held" and here.versions_with_the_secret()
    receipt = as_json(row)
    assert receipt["done_at"] is None and "under object lock" in receipt["remains"]
    until = datetime.fromisoformat(receipt["remains_until"])
    assert timedelta(days=2.9) < until - datetime.now(UTC) < timedelta(days=3.1)
    assert here.ledger.oldest_deletion() is None, "it waits for nothing that somebody could do"

    put(here.store, [sample(0, 4, source="eye")], Position(TOPIC, 0, 5))
    assert row.held_at is not None
    here.lock([each for each in here.versions() if each["LastModified"] > row.held_at], timedelta(days=30))
    assert here.run(2).remains_until == row.remains_until
    until = here.lock(before, timedelta(seconds=2))
    assert wait_until(lambda: datetime.now(UTC) > until, 60)
    monkeypatch.setattr(maintenance, "datetime", _Later)
    row = here.run()
    assert (row.state, row.remains, row.remains_until) == ("done", None, None), "what is locked later has nothing of it"
    assert not here.versions_with_the_secret()


def test_a_right_that_is_missing_and_versions_that_cannot_be_looked_for_are_named(
    tmp_path: Path, server: Moto | MinIO
) -> None:
    here = Installation("forbidden", tmp_path)
    here.run(2)
    here.s3.put_object(Bucket="forbidden", Key="lake/old", Body=SECRET.encode())
    here.s3.delete_object(Bucket="forbidden", Key="lake/old")
    with server.without("s3:DeleteObject", "s3:DeleteObjectVersion"):
        old = OldVersions(here.settings.lake)
        old.purge()
    left = old.left(datetime.now(UTC) + timedelta(minutes=1))
    assert left is not None and "s3:DeleteObjectVersion" in left[0] and left[1] is None
    assert "not looked for" in OldVersions("gs://bucket/lake").unknown
    assert not OldVersions(str(tmp_path)).unknown


class _Later(datetime):
    """A clock that is four days ahead."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(days=4)
