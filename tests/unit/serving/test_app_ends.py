"""What is in flight when a server or a replica ends."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from core.errors import LedgerUnavailable
from core.files import replace_file
from core.ledger import Ledger
from core.settings import Settings
from serving import app as module
from serving.app import build, drain, drain_seconds
from serving.releases.residency import encode_copy, read_residency, residency_path


class Ingress:
    """Answers each call of ``drain`` with the next counts of two replicas."""

    def __init__(self, *counts: list[dict[int, int]]) -> None:
        self.counts = list(counts)

    def broadcast(self, method: str) -> Ingress:
        assert method == "drain"
        return self

    async def results_async(self, return_exceptions: bool) -> list[dict[int, int]]:
        return self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]


@pytest.fixture
def ingress(monkeypatch: pytest.MonkeyPatch) -> Ingress:
    handle = Ingress([{3: 1}, {}], [{}, {3: 2}], [{}, {}])
    monkeypatch.setattr(serve, "get_deployment_handle", lambda name, app: handle)
    return handle


async def test_a_drain_ends_when_no_replica_has_a_request_in_flight(ingress: Ingress) -> None:
    assert await drain(60)
    assert ingress.counts == [[{}, {}]]


async def test_a_drain_ends_at_its_deadline(ingress: Ingress) -> None:
    ingress.counts = [[{3: 1}]]
    began = time.monotonic()
    assert not await drain(0.2)
    assert time.monotonic() - began < 30


def test_every_replica_that_ends_has_until_the_last_deadline(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    application: Any = build(settings)
    seen: dict[str, float] = {}

    def walk(application: Any) -> None:
        deployment = application._bound_deployment
        seen[deployment.name] = deployment._deployment_config.graceful_shutdown_timeout_s
        for argument in deployment.init_args:
            if hasattr(argument, "_bound_deployment"):
                walk(argument)

    walk(application)
    assert {"Ingress", "Encoder", "Catalog", "Controller"} <= seen.keys()
    assert set(seen.values()) == {drain_seconds(settings)}
    assert drain_seconds(settings) > settings.serve.deadline_seconds


def test_a_start_without_a_ledger_needs_a_copy_of_the_residency(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'other.db'}")
    ledger.commit_release(1, clip=None, vlm=None, actor="t", reason="r", proposal_id=None)
    settings = Settings(home=tmp_path, ledger_url="postgresql://nobody@127.0.0.1:1/none")
    with pytest.raises(LedgerUnavailable):
        module._migrate(settings)
    replace_file(residency_path(tmp_path), encode_copy(read_residency(ledger, 2), {}))
    module._migrate(settings)
    assert "starting with release 1, the last known one (file)" in " ".join("".join(capsys.readouterr()).split())
