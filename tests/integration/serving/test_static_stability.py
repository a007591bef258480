"""A server that depends on its stores for change only: the ledger away, the live adapter gone, and an orderly end."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from ops.loading import load_settings
from serving.releases.offline import roll_back_offline
from serving.releases.residency_source import residency_path
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = pytest.mark.integration


def make_server(home: Path) -> ServerFixture:
    """A server whose ledger is behind a link, which is turned in one step."""
    made = ServerFixture.make(home)
    (home / "up").mkdir()
    (home / "down" / "ledger.db").mkdir(parents=True)  # cannot be opened, as a database that is down
    settings = yaml.safe_load(made.config.read_text()) | {"ledger_url": f"sqlite:///{home}/ledger/ledger.db"}
    made.config.write_text(yaml.safe_dump(settings))
    made.settings = load_settings(made.config, environ={})
    point_ledger_to(made, "up")
    return made


def point_ledger_to(server: ServerFixture, folder: str) -> None:
    link = server.settings.home / "ledger.new"
    link.symlink_to(server.settings.home / folder)
    link.replace(server.settings.home / "ledger")


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerFixture]:
    """A server whose stores may be taken away."""
    made = make_server(tmp_path_factory.mktemp("static"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


def ask(server: ServerFixture, text: str = "x") -> httpx.Response:
    return httpx.post(f"{server.url}/v1/embeddings", json={"input": text}, timeout=60)


def test_stores_go_and_come_and_the_same_release_answers(own_server: ServerFixture) -> None:
    server = own_server
    first, second = server.adapter(), server.adapter()
    with server.client() as client:
        client.release(first, reason="one")
        client.release(second, reason="two")
    copy = residency_path(server.settings.home)
    server.until(lambda: copy.is_file() and second in copy.read_text())

    # An orderly end under load: every answer that was begun is given.
    statuses: list[int] = []
    ending = threading.Event()

    def load() -> None:
        while True:
            try:
                statuses.append(ask(server).status_code)
            except httpx.TransportError:  # no connection any more
                return
            if ending.is_set() and statuses[-1] != 200:
                return

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        server.until(lambda: len(statuses) > 20)
        ending.set()
        server.stop()
        for each in loads:
            each.result(60)
    assert set(statuses) <= {200, 503}, statuses

    # Ledger and artifacts away: a start serves the last known release from the node's copies.
    artifacts = Path(server.settings.artifacts)
    artifacts.rename(artifacts.with_suffix(".away"))
    point_ledger_to(server, "down")
    server.start()
    answer = ask(server)
    assert (answer.status_code, answer.headers["x-ratchet-adapter"]) == (200, second)
    assert 'source="file"' in httpx.get(f"{server.url}/metrics", timeout=60).text
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.with_suffix(".away").rename(artifacts)
    point_ledger_to(server, "up")

    # A rollback without the server is adopted by it, everywhere.
    row = roll_back_offline(server.ledger, ["clip"], to=None, actor="t", reason="offline")
    server.until(lambda: ask(server).headers["x-ratchet-release"] == str(row.number))
    assert ask(server).headers["x-ratchet-adapter"] == row.clip == first


def test_a_live_adapter_that_is_gone_is_taken_back_by_itself(own_server: ServerFixture) -> None:
    server = own_server
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
