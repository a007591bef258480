"""Who gets in, and what a session is worth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from fastapi.testclient import TestClient
from pydantic import SecretStr

from core.errors import LedgerError
from core.ledger import KeyRow, Ledger
from core.settings import Settings
from ops.console import security
from ops.console.app import build_console
from ops.console.request_context import local_path
from ops.console.security import COOKIE, Session, Sessions

LOCAL = "http://127.0.0.1:8001"
FAR = "https://console.example"


def visitor(home: Path, base_url: str = LOCAL, **sections: object) -> TestClient:
    settings = Settings(home=home, **{"serve": {"port": 1}, "base": {"vlm": ""}, **sections})  # type: ignore[arg-type]
    return TestClient(build_console(settings), base_url=base_url, follow_redirects=False)


def from_afar(home: Path) -> TestClient:
    """A console that listens to the world."""
    return visitor(home, FAR, console={"host": "0.0.0.0"})


def csrf(client: TestClient, page: str = "/sign-in") -> str:
    (token,) = set(re.findall(r'"x-csrf-token": "([^"]+)"', client.get(page).text))
    return token


def signed_in(client: TestClient, key: str) -> str:
    """Sign in; returns the token that forms now carry."""
    answer = client.post("/sign-in", data={"key": key, "csrf": csrf(client)})
    assert answer.status_code == 303, answer.text
    return csrf(client)


@pytest.fixture
def key(tmp_path: Path) -> str:
    return Settings(home=tmp_path).operator_key().get_secret_value()


def test_each_answer_has_the_id_of_its_request(tmp_path: Path) -> None:
    client = from_afar(tmp_path)
    for page in ("/sign-in", "/", "/health/live", "/nowhere", "/static/nothing.css"):
        assert client.get(page, headers={"x-request-id": "mine"}).headers.get_list("x-request-id") == ["mine"], page


@pytest.mark.parametrize(
    "headers", [{"x-forwarded-for": "198.51.100.7"}, {"x-real-ip": "127.0.0.1"}, {"via": "1.1 proxy"}]
)
def test_what_a_proxy_on_this_machine_forwards_needs_a_key(tmp_path: Path, headers: dict[str, str]) -> None:
    client = visitor(tmp_path)
    for page in ("/", "/audit"):
        assert client.get(page).status_code == 200
        answer = client.get(page, headers=headers)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in"), page


def test_from_afar_nothing_is_shown_without_a_key(tmp_path: Path, key: str) -> None:
    client = from_afar(tmp_path)
    for page in ("/", "/releases", "/gate/x/report", "/samples/" + "0" * 64 + ".png", "/quarantine/t:0:1/picture"):
        answer = client.get(page)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in"), page
    assert client.get("/overview/now", headers={"hx-request": "true"}).headers["hx-redirect"].startswith("/sign-in")
    signed_in(client, key)
    assert client.get("/releases").status_code == 200
    cookie = client.post("/sign-in", data={"key": "x", "csrf": csrf(client)}).headers
    assert "set-cookie" not in cookie, "a wrong key changes no session"


def test_the_cookie_is_for_this_site_and_for_tls_alone(tmp_path: Path, key: str) -> None:
    client = from_afar(tmp_path)
    client.get("/sign-in")
    answer = client.post("/sign-in", data={"key": key, "csrf": csrf(client)})
    cookie = answer.headers["set-cookie"]
    for part in ("HttpOnly", "Secure", "SameSite=Strict", "Path=/", "Max-Age=43200"):
        assert part in cookie
    assert key not in cookie


def test_a_new_key_is_not_called_wrong_while_the_ledger_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_ledger: Ledger) -> list[KeyRow]:
        raise LedgerError("the ledger is away.")

    monkeypatch.setattr("core.access.NEW_KEY_SECONDS", 0.0)
    client = from_afar(tmp_path)
    new = Ledger.open(Settings(home=tmp_path).ledger).create_key("ann", ["operate"], actor="t")[1]
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "api_keys", away)
        answer = client.post("/sign-in", data={"key": new, "csrf": csrf(client)})
    assert answer.status_code == 503 and "may be new" in answer.text
    signed_in(client, new)


def test_a_wrong_key_is_told_apart_from_none(tmp_path: Path) -> None:
    client = visitor(tmp_path)
    answer = client.post("/sign-in", data={"key": "wrong", "csrf": csrf(client)})
    assert answer.status_code == 401 and "not known here" in answer.text


def test_a_revoked_key_ends_its_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("core.access.KEYS_SECONDS", 0.0)
    monkeypatch.setattr("core.access.NEW_KEY_SECONDS", 0.0)
    client = from_afar(tmp_path)
    ledger = Ledger.open(Settings(home=tmp_path).ledger)
    _, token = ledger.create_key("ana", ["operate"], actor="test")
    signed_in(client, token)
    assert client.get("/releases").status_code == 200
    assert [(row.actor, row.action) for row in ledger.audit_rows(1)] == [("key:ana", "sign in")]
    ledger.revoke_key("ana", actor="test", reason="left")
    assert client.get("/releases").status_code == 303


@pytest.mark.parametrize("page", ["/releases/hold", "/playground/search", "/sign-out", "/sign-in"])
def test_a_post_without_the_sessions_token_is_refused(tmp_path: Path, key: str, page: str) -> None:
    client = visitor(tmp_path)
    signed_in(client, key)
    body = {"reason": "x", "expected_live": "0", "text": "x", "key": key}
    of_another = csrf(visitor(tmp_path))
    for forged in ({}, {"csrf": "x"}, {"csrf": "ä"}, {"csrf": of_another}):
        answer = client.post(page, data={**body, **forged})
        assert answer.status_code == 403 and "too old" in answer.text, page


def test_signing_in_makes_a_new_session_token(tmp_path: Path, key: str) -> None:
    client = visitor(tmp_path)
    before = csrf(client)
    assert signed_in(client, key) != before


def test_a_link_on_another_site_does_not_end_the_session(tmp_path: Path, key: str) -> None:
    client = visitor(tmp_path)
    linked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    answer = client.get("/releases", headers=linked)  # as it comes: without the Strict cookie
    assert "set-cookie" not in answer.headers and 'http-equiv="refresh"' in answer.text
    signed_in(client, key)
    assert "<h1>Releases" in client.get("/releases", headers=linked).text


def test_large_bodies_are_refused_declared_or_not(tmp_path: Path) -> None:
    client = visitor(tmp_path, serve={"port": 1, "max_image_bytes": 2000})
    token = csrf(client)
    large = b"x" * 400_000
    declared = client.post("/playground/classify", files={"upload": ("a.png", large)}, headers={"x-csrf-token": token})
    assert declared.status_code == 413 and "Scale the picture down" in declared.text
    chunks = (large[start : start + 1000] for start in range(0, len(large), 1000))
    kind = {"x-csrf-token": token, "content-type": "application/x-www-form-urlencoded"}
    assert client.post("/playground/classify", content=chunks, headers=kind).status_code == 413


def test_too_many_at_once_are_told_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "MAX_REQUESTS", 0)
    answer = visitor(tmp_path).get("/")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "target",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "evil",
        "/a\nb",
        "",
        "/audit?a=" + "x" * 990,
        "/" + "ж" * 300,
    ],
)
def test_nobody_is_sent_elsewhere_after_signing_in(target: str) -> None:
    assert local_path(target) == "/"
    assert local_path("/gate/update-1?x=1") == "/gate/update-1?x=1"


def test_a_session_cannot_be_read_changed_or_kept_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(SecretStr("secret"), hours=1)
    sealed = sessions.seal(Session("csrf", "rk_key"))
    assert "rk_key" not in sealed and sessions.open(sealed) == Session("csrf", "rk_key")
    assert sessions.open(sealed[:-4] + "AAAA") is None
    assert Sessions(SecretStr("another"), hours=1).open(sealed) is None
    assert sessions.open("x" * 10_000) is None and sessions.open("nonsense") is None
    late = Fernet.extract_timestamp(sessions._fernet, sealed.encode()) + 3601
    monkeypatch.setattr("time.time", lambda: late)
    assert sessions.open(sealed) is None


def test_a_damaged_cookie_is_a_new_visitor(tmp_path: Path) -> None:
    client = visitor(tmp_path)
    answer = client.get("/sign-in", headers={"cookie": f'{COOKIE}=gAAAA; other="\\'})
    assert answer.status_code == 200 and COOKIE in answer.headers["set-cookie"]
