from __future__ import annotations

import re
from pathlib import Path

import pytest
from cryptography.fernet import Fernet
from pydantic import SecretStr, ValidationError

from core.errors import LedgerError
from core.ledger import KeyRow, Ledger
from core.settings import Settings
from ops.console import security
from ops.console.request_context import local_path
from ops.console.security import COOKIE, Session, Sessions
from tests.unit.ops.console.conftest import FAR, csrf, from_afar, signed_in, visit

TLS = {"x-forwarded-proto": "https"}


def links(page: str) -> list[str]:
    """Everything of this site in a page that a browser requests."""
    return re.findall(r"""\s(?:href|src|action|formaction|hx-get|hx-post)=["']?(/[^"'\s>]*)""", page)


def test_from_afar_and_through_a_proxy_nothing_is_shown_without_a_key(tmp_path: Path, key: str) -> None:
    far, local = from_afar(tmp_path), visit(tmp_path)
    assert local.get("/audit").status_code == 200
    hidden = ("/", "/releases", "/gate/x/report", "/samples/" + "0" * 64 + ".png", "/quarantine/t:0:1/picture")
    forwarded: tuple[dict[str, str], ...] = ({"x-forwarded-for": "198.51.100.7"}, {"x-real-ip": "127.0.0.1"})
    asked = [far.get(page) for page in hidden]
    asked += [local.get(page, headers=headers) for headers in (*forwarded, {"via": "1.1 proxy"}) for page in hidden]
    for answer in asked:
        assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in"), answer.request.url
    assert far.get("/overview/now", headers={"hx-request": "true"}).headers["hx-redirect"].startswith("/sign-in")
    before = csrf(far)
    assert signed_in(far, key) != before, "a session of its own"
    assert far.get("/releases").status_code == 200
    wrong = far.post("/sign-in", data={"key": "wrong", "csrf": csrf(far)})
    assert wrong.status_code == 401 and "not known here" in wrong.text
    assert "set-cookie" not in wrong.headers, "a wrong key changes no session"


def test_the_cookie_is_for_this_site_and_for_tls_alone(tmp_path: Path, key: str) -> None:
    client = from_afar(tmp_path)
    cookie = client.post("/sign-in", data={"key": key, "csrf": csrf(client)}).headers["set-cookie"]
    for part in ("HttpOnly", "Secure", "SameSite=Strict", "Path=/", "Max-Age=43200"):
        assert part in cookie
    assert key not in cookie
    for headers, secure in ((TLS, True), ({}, False)):
        local = visit(tmp_path).get("/sign-in", headers=headers).headers["set-cookie"]
        assert ("Secure" in local) is secure, "on loopback as it came"
    damaged = visit(tmp_path).get("/sign-in", headers={"cookie": f'{COOKIE}=gAAAA; other="\\'})
    assert damaged.status_code == 200 and COOKIE in damaged.headers["set-cookie"], "a new visitor"


@pytest.mark.usefixtures("at_once")
def test_a_new_key_and_a_revoked_one_are_known_at_once(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_ledger: Ledger) -> list[KeyRow]:
        raise LedgerError("the ledger is away.")

    client = from_afar(tmp_path)
    _, token = ledger.create_key("ana", ["operate"], actor="test")
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "api_keys", away)
        answer = client.post("/sign-in", data={"key": token, "csrf": csrf(client)})
    assert answer.status_code == 503 and "may be new" in answer.text
    signed_in(client, token)
    assert client.get("/releases").status_code == 200
    assert [(row.actor, row.action) for row in ledger.audit_rows(1)] == [("key:ana", "sign in")]
    ledger.revoke_key("ana", actor="test", reason="left")
    assert client.get("/releases").status_code == 303


def test_a_post_without_the_sessions_token_is_refused(tmp_path: Path, key: str) -> None:
    client, of_another = visit(tmp_path), csrf(visit(tmp_path))
    signed_in(client, key)
    body = {"reason": "x", "expected_live": "0", "text": "x", "key": key}
    for page in ("/releases/hold", "/playground/search", "/sign-out", "/sign-in"):
        for forged in ({}, {"csrf": "x"}, {"csrf": "ä"}, {"csrf": of_another}):
            answer = client.post(page, data={**body, **forged})
            assert answer.status_code == 403 and "too old" in answer.text, (page, forged)


def test_a_link_on_another_site_does_not_end_the_session(tmp_path: Path, key: str) -> None:
    client = visit(tmp_path)
    linked = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    answer = client.get("/releases", headers=linked)  # as browsers send it: without the Strict cookie
    assert "set-cookie" not in answer.headers and 'http-equiv="refresh"' in answer.text
    signed_in(client, key)
    assert "<h1>Releases" in client.get("/releases", headers=linked).text


def test_large_bodies_and_too_many_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = visit(tmp_path, serve={"port": 1, "max_image_bytes": 2000})
    token, large = {"x-csrf-token": csrf(client)}, b"x" * 400_000
    declared = client.post("/playground/classify", files={"upload": ("a.png", large)}, headers=token)
    assert declared.status_code == 413 and "Scale the picture down" in declared.text
    chunks = (large[start : start + 1000] for start in range(0, len(large), 1000))
    kind = {**token, "content-type": "application/x-www-form-urlencoded"}
    assert client.post("/playground/classify", content=chunks, headers=kind).status_code == 413
    monkeypatch.setattr(security, "MAX_REQUESTS", 0)
    answer = client.get("/")
    assert answer.status_code == 503 and answer.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "target",
    ["//evil.example", "https://evil.example", "/\\evil.example", "evil", "/a\nb", "", "/audit?a=" + "x" * 990,
     "/" + "ж" * 300],
)  # fmt: skip
def test_nobody_is_sent_elsewhere_after_signing_in(target: str) -> None:
    assert local_path(target) == "/"
    assert local_path("/gate/update-1?x=1") == "/gate/update-1?x=1"


def test_a_session_cannot_be_read_changed_or_kept_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(SecretStr("secret"), hours=1)
    sealed = sessions.seal(Session("csrf", "rk_key"))
    assert "rk_key" not in sealed and sessions.open(sealed) == Session("csrf", "rk_key")
    assert Sessions(SecretStr("another"), hours=1).open(sealed) is None
    for damaged in (sealed[:-4] + "AAAA", "x" * 10_000, "nonsense"):
        assert sessions.open(damaged) is None
    late = Fernet.extract_timestamp(sessions._fernet, sealed.encode()) + 3601
    monkeypatch.setattr("time.time", lambda: late)
    assert sessions.open(sealed) is None


def test_tls_that_ends_at_a_proxy_is_no_missing_tls(tmp_path: Path) -> None:
    client = visit(tmp_path, FAR.replace("https", "http"), console={"host": "0.0.0.0"})
    plain = client.get("/sign-in").text
    assert "not encrypted" in plain and "X-Forwarded-Proto" in plain
    assert "not encrypted" not in client.get("/sign-in", headers=TLS).text


def test_a_name_that_is_not_this_machine_s_is_refused_with_the_setting_that_allows_it(tmp_path: Path) -> None:
    local = visit(tmp_path)
    answer = local.get("/", headers={"host": "console.example"})
    assert answer.status_code == 421 and "'console.example'" in answer.text and "serve.allowed_hosts" in answer.text
    for name in ("localhost:8001", "127.0.0.1", "[::1]:8001"):
        assert local.get("/sign-in", headers={"host": name}).status_code == 200
    assert from_afar(tmp_path).get("/sign-in").status_code == 200, "it listens to the world"
    named = visit(tmp_path, serve={"port": 1, "allowed_hosts": ["console.example"]})
    for name, code in (("console.example", 200), ("other.example", 421)):
        assert named.get("/sign-in", headers={"host": name, **TLS}).status_code == code


@pytest.mark.parametrize("stripped", [True, False])
def test_under_a_path_of_a_proxy_every_link_stays_there(tmp_path: Path, key: str, stripped: bool) -> None:
    prefix = "/tools/ratchet"
    before = "" if stripped else prefix  # proxies may take the path away, or leave it
    client = visit(tmp_path, FAR, console={"host": "0.0.0.0", "path_prefix": prefix})
    away = client.get(f"{before}/releases?limit=5")
    assert away.status_code == 303 and away.headers["location"] == f"{prefix}/sign-in?next=%2Freleases%3Flimit%3D5"
    form = {"key": key, "csrf": csrf(client, f"{before}/sign-in?next=/releases"), "next": "/releases"}
    arrived = client.post(f"{before}/sign-in", data=form)
    assert arrived.status_code == 303 and arrived.headers["location"] == f"{prefix}/releases"
    for page in ("/", "/releases", "/playground", "/audit", "/quarantine", "/nowhere"):
        answer = client.get(before + page, headers={"x-request-id": "mine"})
        assert answer.headers.get_list("x-request-id") == ["mine"]
        found = links(answer.text)
        assert len(found) > 5 and all(link.startswith(f"{prefix}/") for link in found), page
        assert int(answer.headers["content-length"]) == len(answer.content)
    assert client.get(f"{before}/static/console.css").status_code == 200
    moved = {"hx-request": "true", "hx-current-url": f"{FAR}{prefix}/releases?limit=5"}
    client.cookies.clear()
    back = client.get(f"{before}/overview/now", headers=moved).headers["hx-redirect"]
    assert back == f"{prefix}/sign-in?next=%2Freleases%3Flimit%3D5"


@pytest.mark.parametrize("wrong", ["ratchet", "/ratchet/", "//evil.example", "/a b", '/"'])
def test_a_path_that_is_none_is_an_error_of_the_settings(wrong: str) -> None:
    with pytest.raises(ValidationError):
        Settings(console={"path_prefix": wrong})
