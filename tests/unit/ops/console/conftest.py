from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from core.ledger import Ledger
from core.settings import Settings
from ops.console.app import build_console

LOCAL = "http://127.0.0.1:8001"
FAR = "https://console.example"
PARTIAL = {"hx-request": "true", "hx-target": "dialog"}


def settings(home: Path, **console: object) -> Settings:
    """A home whose server and broker are not running: nothing listens on port 1."""
    away = {"serve": {"port": 1}, "kafka": {"bootstrap": "127.0.0.1:1"}}
    return Settings(home=home, base={"vlm": ""}, console=console, **away)  # type: ignore[arg-type]


def visit(home: Path, base_url: str = LOCAL, **sections: object) -> TestClient:
    made = Settings(home=home, **{"serve": {"port": 1}, "base": {"vlm": ""}, **sections})  # type: ignore[arg-type]
    return TestClient(build_console(made), base_url=base_url, follow_redirects=False)


def from_afar(home: Path) -> TestClient:
    return visit(home, FAR, console={"host": "0.0.0.0"})


def csrf(client: TestClient, page: str = "/sign-in") -> str:
    (token,) = set(re.findall(r'"x-csrf-token": "([^"]+)"', client.get(page).text))
    return token


def signed_in(client: TestClient, key: str) -> str:
    answer = client.post("/sign-in", data={"key": key, "csrf": csrf(client)})
    assert answer.status_code == 303, answer.text
    return csrf(client)


def text(client: TestClient, page: str) -> str:
    answer = client.get(page)
    assert answer.status_code == 200, answer.text
    return " ".join(html.unescape(answer.text).split())


def release(
    ledger: Ledger, clip: str | None = None, vlm: str | None = None, share: float = 1.0, actor: str = "ana"
) -> None:
    live = ledger.live()
    number = (live.number if live else 0) + 1
    ledger.commit_release(
        number, clip=clip, vlm=vlm, actor=actor, reason=f"number {number}", proposal_id=None, share=share
    )


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """Let pages wait for the store: the first call of the process imports Lance, which has taken more than 5 s here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ops.console.data.PATIENCE_SECONDS", 120.0)
        yield


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.access.KEYS_SECONDS", 0.0)
    monkeypatch.setattr("core.access.NEW_KEY_SECONDS", 0.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger.open(settings(tmp_path).ledger)
    yield opened
    opened.close()


@pytest.fixture
def key(tmp_path: Path) -> str:
    return Settings(home=tmp_path).operator_key().get_secret_value()


@pytest.fixture
def visitor(tmp_path: Path, ledger: Ledger) -> Iterator[TestClient]:
    with TestClient(build_console(settings(tmp_path)), base_url=LOCAL, follow_redirects=False) as client:
        yield client


@pytest.fixture
def operator(visitor: TestClient, key: str) -> TestClient:
    visitor.headers["x-csrf-token"] = signed_in(visitor, key)
    return visitor
