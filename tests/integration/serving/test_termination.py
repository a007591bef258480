"""A server that needs its stores only for changes: no ledger, no live adapter, and an orderly shutdown."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from serving.releases.residency import residency_path
from serving.releases.rollback import roll_back_offline
from tests.integration.serving.conftest import ROLLOUT
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = pytest.mark.integration


def ask(server: ServerFixture, timeout: float = 60.0) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json={"input": "x"}, timeout=timeout, trust_env=False)


def test_an_orderly_end_answers_what_is_in_flight_and_a_start_without_stores_serves_the_same_release(
    server: ServerFixture,
) -> None:
    first, second = server.adapter(), server.adapter()
    with server.client() as client:
        client.release(first, reason="one")
        client.release(second, reason="two")
    copy = residency_path(server.settings.home)
    server.until(lambda: copy.is_file() and second in copy.read_text())
    end_with_requests_in_flight(server)

    # Ledger and artifacts away: a start serves the last known release from the node's copies.
    artifacts = Path(server.settings.artifacts)
    artifacts.rename(artifacts.with_suffix(".away"))
    server.move_ledger("down")
    server.configure(rollout=ROLLOUT)  # needed by later tests
    server.start()
    answer = ask(server)
    assert (answer.status_code, answer.headers["x-ratchet-adapter"]) == (200, second)
    assert 'source="file"' in httpx.get(f"{server.url}/metrics", timeout=60).text
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.with_suffix(".away").rename(artifacts)
    server.move_ledger("up")

    # A rollback without the server is adopted by it, everywhere.
    row = roll_back_offline(server.ledger, ["clip"], to=None, actor="t", reason="offline")
    server.until(lambda: ask(server).headers["x-ratchet-release"] == str(row.number))
    assert ask(server).headers["x-ratchet-adapter"] == row.clip == first


def end_with_requests_in_flight(server: ServerFixture) -> None:
    """SIGTERM while four requests are stalled: they are answered later, and new ones are refused at once."""
    assert server.process is not None
    with ThreadPoolExecutor(4) as pool:
        with server.stopped_encoders():
            requests = [pool.submit(ask, server) for _ in range(4)]
            server.until(lambda: server.requests_in_flight() >= len(requests))
            server.process.send_signal(signal.SIGTERM)
            server.until(lambda: refuses(server))
        assert [request.result().status_code for request in requests] == [200] * len(requests)
    server.process.wait(60)


def refuses(server: ServerFixture) -> bool:
    """Whether a new request is refused. An admitted request gets no answer within the timeout."""
    try:
        return ask(server, timeout=3.0).status_code == 503
    except httpx.TimeoutException:
        return False
    except httpx.TransportError:
        return True


@pytest.mark.long
def test_a_live_adapter_that_is_gone_is_taken_back_by_itself(server: ServerFixture) -> None:
    before = server.ledger.live()
    gone = server.adapter()
    with server.client() as client:
        client.release(gone, reason="will be lost")
    server.stop()
    for folder in (
        Path(server.settings.artifacts) / "adapters" / gone,
        server.settings.home / "serving/adapters" / gone,
    ):
        shutil.rmtree(folder)
    server.start()
    assert before is not None and ask(server).headers["x-ratchet-adapter"] == before.clip
    server.until(lambda: (row := server.ledger.live()) is not None and row.actor == "ratchet")
    live = server.ledger.live()
    assert live is not None and live.clip == before.clip and f"{gone} cannot be loaded" in live.reason
    server.until(lambda: ask(server).headers["x-ratchet-release"] == str(live.number))
