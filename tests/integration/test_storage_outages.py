"""Operators get a prompt one-line message about an object store that is down, hangs, denies access or lacks the
bucket.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from s3fs import S3FileSystem
from typer.testing import CliRunner

from core.artifacts import Artifacts
from core.errors import ArtifactsUnavailable, StoreUnavailable
from core.ledger import Ledger
from core.settings import Settings
from ops import dependency_checks
from ops.cli import doctor
from ops.cli.main import app
from ops.dependency_checks import look
from streams.store.maintenance import clean
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter
from tests.support.s3 import Moto, s3_server

MUCH_SECONDS = 100.0
"""For an attempt; without a limit Lance alone takes 180 s for each."""


@pytest.fixture
def server() -> Iterator[Moto]:
    with s3_server() as running:
        assert isinstance(running, Moto)
        boto3.client("s3").create_bucket(Bucket="models")
        yield running


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long timeouts of store and broker, for a busy machine: they are not tested here."""
    monkeypatch.setattr(dependency_checks, "CALL_SECONDS", 120.0)
    monkeypatch.setattr(dependency_checks, "LOOK_SECONDS", 240.0)
    monkeypatch.setattr(dependency_checks, "_broker", lambda settings: "answers")


def on(tmp_path: Path, name: str) -> Settings:
    stores = {"lake_url": f"s3://{name}/lake", "artifacts_url": f"s3://{name}/artifacts"}
    return Settings.model_validate({"home": tmp_path, **stores, "kafka": {"bootstrap": "127.0.0.1:1"}})


RIGHTS = [("read", "Get", "Head"), ("written", "Put"), ("deleted from", "Delete")]
"""What cannot be done without rights on objects; moto asks for one of its own for HEAD."""


@pytest.mark.parametrize("right", RIGHTS, ids=lambda right: right[0])
@pytest.mark.usefixtures("patient")
def test_a_right_that_is_missing_is_named(tmp_path: Path, server: Moto, right: tuple[str, ...]) -> None:
    told, *denied = right
    with server.without(*(f"s3:{action}Object" for action in denied)):
        found = look(on(tmp_path, "models"), write=True)
    assert (found["store"].state, found["artifacts"].state) == ("refused", "refused")
    assert all(f"cannot be {told}: " in found[name].detail for name in ("store", "artifacts"))  # type: ignore[index]
    S3FileSystem.clear_instance_cache()
    found = look(on(tmp_path, "models"), write=True)
    assert (found["store"].state, found["artifacts"].state) == ("ok", "ok")
    listed = boto3.client("s3").list_objects_v2(Bucket="models").get("Contents", [])
    assert not [each["Key"] for each in listed if each["Key"].endswith(".ratchet-check")], "nothing is left behind"


@pytest.mark.usefixtures("server", "patient")
def test_a_bucket_that_is_missing_is_no_empty_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="NoSuchBucket: The specified bucket does not exist") as caught:
        SampleStore("s3://none/lake").tally()
    assert caught.value.state == "refused" and "<" not in str(caught.value)
    assert SampleStore("s3://models/other").tally() == {}
    found = look(on(tmp_path, "none"))
    assert {found["store"].state, found["artifacts"].state} == {"refused"}
    assert "bucket does not exist" in found["store"].detail
    artifacts = Artifacts("s3://none/artifacts", cache=tmp_path)
    for call in (lambda: artifacts.write_bytes("x", b"1"), lambda: artifacts.read_bytes("x")):
        with pytest.raises(ArtifactsUnavailable, match="bucket does not exist"):
            call()


def test_versions_that_cannot_be_deleted_are_an_error(server: Moto) -> None:
    store = SampleStore("s3://models/undeletable")
    for _ in range(3):
        StoreWriter(store.table).claim([Position("t", 0, 0)])
    with server.without("s3:DeleteObject"), pytest.raises(StoreUnavailable, match="were not deleted") as caught:
        clean(store, timedelta(0))
    assert caught.value.state == "refused"
    assert clean(store, timedelta(0)) > 0


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(("silent", "state"), [(True, "slow"), (False, "away")])
def test_status_and_doctor_end_soon_and_name_a_store_that_hangs_or_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent: bool, state: str
) -> None:
    Ledger.open(Settings(home=tmp_path).ledger).close()  # its tables take seconds on a busy machine
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if silent:
            listener.listen()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        flags = [
            f"home={tmp_path}", "serve.port=1", "base.vlm=", "lake_url=s3://models/lake",
            "artifacts_url=s3://models/artifacts", f"kafka.bootstrap={address}",
        ]  # fmt: skip
        words = [word for flag in flags for word in ("--set", flag)]

        def ratchet(*command: str) -> Any:
            return CliRunner().invoke(app, [*words, *command], env={"COLUMNS": "300"})

        monkeypatch.setattr(doctor, "_CHECKS", {})
        if not silent:  # on a busy machine a refusal, which is tried again, takes longer than a look waits
            monkeypatch.setattr(dependency_checks, "LOOK_SECONDS", MUCH_SECONDS)
            monkeypatch.setattr(dependency_checks, "CALL_SECONDS", 12.0)
        began = time.monotonic()
        shown = ratchet("status")
        assert time.monotonic() - began < MUCH_SECONDS
        assert shown.exit_code == 0, shown.output
        for name in ("store", "artifacts", "broker"):
            lines = [line.split(". ")[0] for line in shown.output.splitlines() if line.startswith(name)]
            assert lines == [f"{name}: {state}"]
        assert "ledger: ok" in shown.output and "no release yet" in shown.output, "what can be known is told"
        told = ratchet("doctor")
        assert told.exit_code == 1
        for name in ("store", "artifacts"):
            assert [line for line in told.output.splitlines() if f" {name} " in line and f" {state}: " in line]
    assert "moto-secret" not in shown.output + told.output
    assert os.environ["AWS_SECRET_ACCESS_KEY"] == "moto-secret"
