"""Artifacts, bases and the sample store on an S3 server, as in a cluster: over HTTP, with keys from the environment."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from s3fs import S3FileSystem

from core.artifacts import Artifacts
from core.artifacts.object_store import CALL_SECONDS
from core.errors import AdapterError, ArtifactsUnavailable, BaseModelError, RecordError, Superseded
from core.settings import Settings
from core.settings.streams import Ingest
from serving.engines.clip_base import load_base
from streams.ingest import ingest_report
from streams.records.uris import UriFetcher
from streams.store.rows import Position, SampleTable, tally_of
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.fake_kafka import FakeKafka, install
from tests.support.kafka import good, reading, wait_for
from tests.support.s3 import s3_server
from tests.support.samples import TOPIC, put, sample
from tests.support.tiny import tiny_base
from updater.bases.register import pull_base, push_base

BUCKET = "models"
MUCH_SECONDS = 30.0
"""For a call with a limit of one second; without a limit, S3 clients wait minutes for a silent server."""


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[None]:
    with s3_server():
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield


@pytest.fixture(autouse=True)
def fresh_clients() -> Iterator[None]:
    yield
    S3FileSystem.clear_instance_cache()


def test_an_adapter_comes_back_as_it_was_its_name_is_not_reused_and_what_is_deleted_is_gone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True)
    (source / "weights.bin").write_bytes(bytes(range(256)) * 1000)
    (source / "inner" / "config.json").write_text("{}")
    artifacts = Artifacts(f"s3://{BUCKET}/ratchet", cache=tmp_path / "cache")
    for _ in range(2):
        artifacts.put_directory(source, "adapters/clip-1")
    fetched = Artifacts(f"s3://{BUCKET}/ratchet", cache=tmp_path / "other pod").fetch("adapters/clip-1")
    assert (fetched / "weights.bin").read_bytes() == bytes(range(256)) * 1000
    assert sorted(path.name for path in fetched.rglob("*")) == ["config.json", "inner", "weights.bin"]
    (source / "weights.bin").write_bytes(b"others")
    with pytest.raises(AdapterError, match="never reused"):
        artifacts.put_directory(source, "adapters/clip-1")
    artifacts.write_bytes("reports/u/report.json", b"{}")
    assert artifacts.sizes("reports") == {"u": 2}
    for _ in range(2):
        artifacts.delete("adapters/clip-1")
        artifacts.delete("reports/u")
        assert not artifacts.exists("adapters/clip-1")
        assert artifacts.sizes("adapters") == artifacts.sizes("reports") == {}
    artifacts.put_directory(source, "adapters/clip-1")
    assert (artifacts.fetch("adapters/clip-1") / "weights.bin").read_bytes() == b"others"


@pytest.mark.parametrize(("silent", "seconds"), [(True, 1.0), (False, CALL_SECONDS)])
def test_an_object_store_that_hangs_or_is_away_fails_within_the_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool, seconds: float
) -> None:
    """Within a second or, if connections are refused, as soon as that is certain."""
    (tmp_path / "weights.bin").write_bytes(b"whole")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # bound, so that nothing else answers there; callers are refused
        if silent:
            listener.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        S3FileSystem.clear_instance_cache()
        artifacts = Artifacts(f"s3://{BUCKET}/hangs", cache=tmp_path / "cache", seconds=seconds)
        calls: list[Callable[[], object]] = [
            lambda: artifacts.exists("adapters/clip-1"),
            lambda: artifacts.fetch("adapters/clip-1"),
            lambda: artifacts.put_directory(tmp_path, "adapters/clip-1"),
            lambda: artifacts.read_bytes("reports/1"),
            lambda: artifacts.write_bytes("reports/1", b"1"),
        ]
        for call in calls:
            began = time.monotonic()
            with pytest.raises(ArtifactsUnavailable) as caught:
                call()
            assert time.monotonic() - began < MUCH_SECONDS
            assert "secret" not in str(caught.value)


def test_a_base_that_one_machine_pushed_is_pulled_by_another(tmp_path: Path) -> None:
    url, there = f"s3://{BUCKET}/bases", tmp_path / "there"
    base = tiny_base(tmp_path / "here")
    push_base(tmp_path / "here", "tiny", Artifacts(url, cache=tmp_path / "cache"))
    for _ in range(2):  # again is fine
        assert pull_base(there, "tiny", url) == there / "bases" / "tiny"
    assert load_base(there, "tiny").digest == base.digest
    tiny_base(tmp_path / "third", seed=1)
    with pytest.raises(BaseModelError, match="another base"):
        pull_base(tmp_path / "third", "tiny", url)
    with pytest.raises(BaseModelError, match="ratchet base push none"):
        pull_base(there, "none", url)
    assert [path.name for path in (there / "bases").iterdir()] == ["tiny"]


def test_images_are_fetched_from_listed_prefixes_within_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    client = boto3.client("s3")
    for key, size in {"photos/a b%20.png": 1000, "photos/big.png": 1025, "photos/none": 0, "secret/a.png": 9}.items():
        client.put_object(Bucket=BUCKET, Key=key, Body=b"x" * size)
    allowed = Ingest(allowed_uris=[f"s3://{BUCKET}/photos/"], max_image_bytes=1024)
    reasons = {
        "photos/big.png": "image_too_large", "photos/gone.png": "uri_unreachable", "photos": "uri_not_allowed",
        "secret/a.png": "uri_not_allowed", "photos/../secret/a.png": "uri_not_allowed", "": "uri_not_allowed",
    }  # fmt: skip
    with closing(UriFetcher(allowed)) as fetcher:
        uris = [f"s3://{BUCKET}/photos/a b%20.png"] * 50
        with ThreadPoolExecutor(50) as workers:
            assert set(workers.map(fetcher.fetch, uris)) == {b"x" * 1000}
        assert fetcher.fetch(f"s3://{BUCKET}/photos/none") == b""
        for key, reason in reasons.items():
            with pytest.raises(RecordError) as caught:
                fetcher.fetch(f"s3://{BUCKET}/{key}")
            assert (key, caught.value.reason) == (key, reason)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")  # a store that is away
    with (
        closing(UriFetcher(allowed)) as fetcher,
        pytest.raises(RecordError, match=r"cannot be read now\. Tries: 4") as caught,
    ):
        fetcher.fetch(f"s3://{BUCKET}/photos/a.png")
    assert caught.value.reason == "uri_unreachable"
    assert "127.0.0.1" not in str(caught.value)


def test_samples_and_offsets_are_one_commit_there_too_and_of_two_writers_only_the_newer_stores() -> None:
    """The fence of the sample store needs conditional writes; without them an S3 server would store both."""
    url = f"s3://{BUCKET}/lake"
    first, second = SampleStore(url), SampleStore(url)
    assert (first.version(), first.count()) == (0, 0)
    pinned = put(first, [sample(0, 0), sample(0, 1)], Position(TOPIC, 0, 2))
    assert second.offsets() == {f"{TOPIC}:0": 2}
    put(second, [sample(0, 2)], Position(TOPIC, 0, 3))
    assert (first.count(), first.count(version=pinned)) == (3, 2)
    assert first.scan(columns=["text"])["text"].to_pylist() == ["text 0", "text 1", "text 2"]
    [old], [new] = (StoreWriter(SampleTable(url)).claim([Position(TOPIC, 0, 0)]) for _ in range(2))
    row = sample(0, 3)
    with pytest.raises(Superseded):
        StoreWriter(SampleTable(url)).commit([row], [(old, replace(old.position, next=4))])
    tally = new.position.tally + tally_of([row])
    StoreWriter(SampleTable(url)).commit([row], [(new, replace(new.position, next=4, tally=tally))])
    assert (first.count(), first.scan(columns=["id"]).num_rows, first.offsets()) == (4, 4, {f"{TOPIC}:0": 4})


@pytest.mark.skipif(os.environ.get("RATCHET_TEST_S3") == "minio", reason="the requests are counted in moto's log")
def test_a_commit_of_a_trickle_costs_two_listings_and_four_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kafka = FakeKafka("t")
    install(kafka, monkeypatch)
    monkeypatch.setattr(ingest_report, "STORE_SECONDS", 3600.0)
    stream = {"topic": "t", "batch_seconds": 0.02, "bootstrap": "127.0.0.1:1"}
    lake = f"s3://{BUCKET}/trickle"
    settings = Settings.model_validate({"home": tmp_path, "lake_url": lake, "kafka": stream})
    with reading(settings) as consumer, caplog.at_level(logging.INFO, "werkzeug"):
        for number in range(8):
            if number == 3:  # the first ones need more
                caplog.clear()
                before = consumer.status.commits
            kafka.send(good(number))
            wait_for(lambda n=number: consumer.status.samples > n, "a sample")  # type: ignore[misc]
        commits = consumer.status.commits - before
        asked = [record.getMessage().partition('"')[2] for record in caplog.records if record.name == "werkzeug"]
    assert commits == 5
    assert sum(each.startswith("GET") and "list-type=2" in each for each in asked) == 2 * commits, asked
    assert sum(each.startswith("PUT") for each in asked) == 4 * commits, asked
