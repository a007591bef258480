"""Authentication in the real application: who gets in, where, and what the audit log calls him."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from core.access import KEYS_SECONDS, NEW_KEY_SECONDS
from core.errors import AlreadyResubmitted, BrokerError, LedgerError, RecordError, UnknownRecord
from core.ledger import KeyRow, Ledger
from core.settings import Settings
from serving import app as start
from serving.http.auth import needs
from tests.unit.serving.auth_app import OPERATOR, AuthApp, Keys, refusal

PATHS = {"deletion_id": "d", "model": "clip", "sample_id": "0" * 64, "topic": "t", "partition": 0, "offset": 0}


def away() -> list[KeyRow]:
    raise LedgerError("the ledger is away.")


@pytest.fixture
def local(keys: Keys, tmp_path: Path) -> AuthApp:
    """A server on loopback."""
    return AuthApp(keys.ledger, tmp_path, host="127.0.0.1")


def calls(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path of the application."""
    found = [
        (method, path.format(**PATHS))
        for path, item in app.openapi()["paths"].items()
        for method in item
    ]  # fmt: skip
    assert len(found) > 15
    return [*found, ("get", "/docs"), ("get", "/openapi.json"), ("get", "/v1/nothing"), ("get", "/")]


async def test_where_others_can_reach_it_every_route_but_health_wants_a_key(closed: AuthApp) -> None:
    for method, path in calls(closed.app):
        if path.startswith("/health/"):
            assert needs(path) == ()
            continue
        answer = await closed.send(method.upper(), path)
        message = refusal(answer, 401, "invalid_api_key")
        assert "ratchet keys create" in message
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"


async def test_a_route_that_somebody_adds_is_closed(closed: AuthApp) -> None:
    async def secret() -> str:
        return "secret"

    closed.app.router.routes.append(APIRoute("/v2/new", secret))
    assert (await closed.get("/v2/new")).status_code == 401


async def test_on_loopback_whoever_comes_may_infer_but_not_operate(local: AuthApp) -> None:
    for key in ("", "none", "sk-whatever"):
        assert (await local.get("/v1/models", key)).status_code == 200
        assert (await local.get("/docs", key)).status_code == 200
        refusal(await local.send("POST", "/admin/v1/hold", key, json={"reason": "r"}), 401, "invalid_api_key")
    assert local.desk.actors == []


FORWARDED = (
    {"x-forwarded-for": "198.51.100.7"}, {"x-forwarded-for": "198.51.100.7, 127.0.0.1"}, {"x-forwarded-for": "unknown"},
    {"x-real-ip": "127.0.0.1"}, {"forwarded": "for=_hidden"}, {"via": "1.1 proxy"}, {"x-forwarded-proto": "https"},
)  # fmt: skip


@pytest.mark.parametrize("headers", FORWARDED)
async def test_what_a_proxy_on_this_machine_forwards_needs_a_key(
    local: AuthApp, keys: Keys, headers: dict[str, str]
) -> None:
    for path in ("/v1/models", "/metrics"):
        assert (await local.send("GET", path, headers=headers)).status_code == 401, path
        assert (await local.send("GET", path, keys.of("infer"), headers=headers)).status_code == 200, path
    assert (await local.send("GET", "/v1/models", headers={"x-forwarded-for": "127.0.0.1"})).status_code == 200


async def test_on_loopback_a_wrong_key_is_told_so(local: AuthApp, keys: Keys) -> None:
    token = keys.of("infer")
    assert (await local.get("/v1/models", token)).status_code == 200
    for wrong in (token[:-1], token[:-4] + "zzzz", f"rk_ffffffff_{'0' * 64}"):
        assert "not valid" in refusal(await local.get("/v1/models", wrong), 401, "invalid_api_key")


async def test_a_key_opens_what_its_scopes_name(closed: AuthApp, keys: Keys) -> None:
    infer, search, publish, operate = (keys.of(scope) for scope in ("infer", "search", "publish", "operate"))
    held: dict[str, Any] = {"json": {"reason": "r"}}
    assert (await closed.get("/v1/models", infer)).status_code == 200
    assert (await closed.send("POST", "/admin/v1/hold", operate, **held)).status_code == 200
    assert (await closed.get("/v1/samples/some/image", search)).status_code not in (401, 403)
    for key in (publish, operate):
        assert (await closed.get("/admin/v1/quarantine", key)).status_code == 200
    for method, path, key, scope in [
        ("GET", "/v1/models", operate, "`infer`"),
        ("GET", "/v1/models", search, "`infer`"),
        ("POST", "/v1/search", infer, "`search`"),
        ("GET", "/v1/samples/some/image", infer, "`search`"),
        ("POST", "/admin/v1/hold", infer, "`operate`"),
        ("POST", "/admin/v1/hold", publish, "`operate`"),
        ("GET", "/admin/v1/quarantine", infer, "`publish` or `operate`"),
    ]:
        answer = await closed.send(method, path, key, **held)
        assert scope in refusal(answer, 403, "insufficient_scope")
        assert answer.json()["error"]["type"] == "permission_error"


async def test_the_bootstrap_key_opens_everything(closed: AuthApp) -> None:
    for path in ("/v1/models", "/admin/v1/quarantine", "/metrics", "/docs", "/openapi.json"):
        assert (await closed.get(path, OPERATOR)).status_code == 200
    refusal(await closed.get("/v1/models", OPERATOR + "x"), 401, "invalid_api_key")


async def test_only_a_bearer_token_is_a_key(closed: AuthApp, keys: Keys) -> None:
    token = keys.of("infer")
    given = [f"Bearer {token}", f"bearer  {token} ", token, f"Basic {token}", "Bearer", "Bearer s\u00e9cret"]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(closed.app), base_url="http://localhost") as http:
        answers = [await http.get("/v1/models", headers={"authorization": cast(Any, text.encode())}) for text in given]
    assert [answer.status_code for answer in answers] == [200, 200, 401, 401, 401, 401]


@pytest.mark.parametrize(
    ("host", "require", "setting", "anyone"),
    [
        ("127.0.0.1", "auto", "auto", True), ("127.0.0.1", "always", "auto", False),
        ("0.0.0.0", "never", "auto", False), ("0.0.0.0", "always", "open", True), ("127.0.0.1", "auto", "key", False),
    ],
)  # fmt: skip
async def test_metrics_are_open_on_loopback_or_when_told(
    keys: Keys, tmp_path: Path, host: str, require: str, setting: str, anyone: bool
) -> None:
    auth_app = AuthApp(keys.ledger, tmp_path, host, metrics=setting, require_keys=require)
    assert (await auth_app.get("/metrics")).status_code == (200 if anyone else 401)
    assert (await auth_app.get("/metrics", keys.of("publish"))).status_code == 200  # any key will do


async def test_a_revoked_key_is_refused_within_seconds(closed: AuthApp, keys: Keys) -> None:
    row, token = keys.ledger.create_key("leaver", ["infer"], actor="t")
    assert (await closed.get("/v1/models", token)).status_code == 200
    keys.ledger.revoke_key(row.id, actor="t", reason="left")
    closed.clock.now += KEYS_SECONDS
    refusal(await closed.get("/v1/models", token), 401, "invalid_api_key")


async def test_a_new_key_works_though_the_keys_have_just_been_read(closed: AuthApp, keys: Keys) -> None:
    refusal(await closed.get("/v1/models", f"rk_{'0' * 8}_{'0' * 64}"), 401, "invalid_api_key")
    closed.clock.now += NEW_KEY_SECONDS / 4
    new = keys.ledger.create_key("fresh", ["infer"], actor="t")[1]
    waiting = asyncio.create_task(closed.get("/v1/models", new))
    while not waiting.done():
        closed.clock.now += NEW_KEY_SECONDS / 4
        await asyncio.sleep(0.01)
    assert (await waiting).status_code == 200


async def test_a_ledger_that_hangs_holds_nobody_up_for_long(
    closed: AuthApp, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = keys.of("infer")
    assert (await closed.get("/v1/models", token)).status_code == 200
    closed.clock.now += KEYS_SECONDS
    closed.slow = threading.Event()
    monkeypatch.setattr("serving.http.auth.READ_SECONDS", 0.2)
    new = keys.ledger.create_key("new", ["infer"], actor="t")[1]
    try:
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*(closed.get("/v1/models", token) for _ in range(5)))
            assert [answer.status_code for answer in answers] == [200] * 5
            assert (await closed.get("/v1/models", OPERATOR)).status_code == 200
            refused = await closed.get("/v1/models", new)
            refusal(refused, 503, "unavailable")  # it is not told that it is wrong or was revoked
            assert refused.headers["retry-after"]
            for wrong in ("rk_cut", token[:-1] + ("0" if token[-1] != "0" else "1")):
                refusal(await closed.get("/v1/models", wrong), 401, "invalid_api_key")
    finally:
        closed.slow.set()


async def test_a_silent_ledger_makes_no_known_key_that_is_in_use_wait(closed: AuthApp, keys: Keys) -> None:
    """A key that waited for a reading would wait for half a minute here."""
    token = keys.of("infer")
    assert (await closed.get("/v1/models", token)).status_code == 200
    closed.slow = threading.Event()
    try:
        async with asyncio.timeout(20):
            closed.clock.now += KEYS_SECONDS / 2
            assert (await closed.get("/v1/models", token)).status_code == 200  # which begins a reading behind itself
        closed.slow.set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(closed, "api_keys", away)
            closed.clock.now += KEYS_SECONDS
            await asyncio.to_thread(closed.access.refresh, 60.0)
        assert closed.access.silent
        closed.slow = threading.Event()
        async with asyncio.timeout(20):
            for _ in range(3):
                closed.clock.now += KEYS_SECONDS
                assert (await closed.get("/v1/models", token)).status_code == 200
    finally:
        closed.slow.set()


async def test_a_new_key_is_told_to_come_back_while_the_ledger_is_away(
    closed: AuthApp, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed.access.refresh()
    new = keys.ledger.create_key("later", ["infer"], actor="t")[1]
    closed.clock.now += KEYS_SECONDS
    with monkeypatch.context() as patch:
        patch.setattr(closed, "api_keys", away)
        for _ in range(2):  # the second is not looked for again, and told the same
            refusal(await closed.get("/v1/models", new), 503, "unavailable")
    closed.clock.now += KEYS_SECONDS
    assert (await closed.get("/v1/models", new)).status_code == 200
    refusal(await closed.get("/v1/models", f"rk_{'0' * 8}_{'0' * 64}"), 401, "invalid_api_key")


async def test_the_audit_names_the_key_and_what_its_holder_says_behind_it(closed: AuthApp, keys: Keys) -> None:
    body = {"reason": "r"}
    for key, said in [(keys.of("operate"), ""), (keys.of("operate"), "ann"), (OPERATOR, "j\u00f6rg"), (OPERATOR, "")]:
        raw = cast(Any, said.encode())
        assert (await closed.send("POST", "/admin/v1/hold", key, raw, json=body)).status_code == 200
    assert closed.desk.actors == ["key:operate-none", "key:operate-none/ann", "j\u00f6rg", "operator"]


@pytest.mark.parametrize("said", ["key:operate-none", "updater", "x" * 101, "a\x07"])
async def test_nobody_acts_under_the_name_of_a_key_or_of_a_part(closed: AuthApp, keys: Keys, said: str) -> None:
    for key in (OPERATOR, keys.of("operate")):
        answer = await closed.send("POST", "/admin/v1/hold", key, said, json={"reason": "r"})
        refusal(answer, 400, "invalid_actor")
    assert closed.desk.actors == []


async def test_a_refused_record_is_sent_again_by_whoever_may_publish(closed: AuthApp, keys: Keys) -> None:
    asked = {"place": "t:0:1", "reason": "mended"}
    answer = await closed.send("POST", "/admin/v1/quarantine/resubmit", keys.of("publish"), json=asked)
    assert answer.json() == {"object": "resubmission", "place": "t:0:1", "topic": "t", "partition": 0, "offset": 9}
    assert closed.desk.actors == ["key:publish-none"]
    for failure, status, code in [
        (UnknownRecord("none there"), 404, "record_not_found"),
        (AlreadyResubmitted("was sent"), 409, "already_resubmitted"),
        (RecordError("empty", "no value"), 400, "empty"),
        (BrokerError("away"), 503, "broker"),
    ]:
        closed.desk.failure = failure
        refused = await closed.send("POST", "/admin/v1/quarantine/resubmit", OPERATOR, json=asked)
        refusal(refused, status, code)
        assert refused.json()["error"]["param"] == ("place" if status in (400, 404) else None)


async def test_refused_records_are_sent_again_by_a_filter(closed: AuthApp, keys: Keys) -> None:
    path, publish = "/admin/v1/quarantine/resubmit", keys.of("publish")
    body = {"filter": {"reason": "schema", "source": "cam", "limit": 7}, "reason": "mended", "dry_run": True}
    answer = await closed.send("POST", path, publish, json=body)
    assert answer.json() == {"object": "resubmission.report", "limit": 7, "source": "cam", "dry_run": True}
    assert closed.desk.actors == ["key:publish-none"]
    for wrong, param in [
        ({"filter": {"reason": "nonsense"}}, "filter.reason"), ({"filter": {"limit": 501}}, "filter.limit"),
        ({}, None), ({"filter": {}, "place": "t:0:1"}, None), ({"filter": {}, "force": True}, None),
        ({"place": "t:0:1", "dry_run": True}, None), ({"filter": {"since": "3000-01-01T00:00:00Z"}}, "filter.since"),
    ]:  # fmt: skip
        refused = await closed.send("POST", path, publish, json={"reason": "r", **wrong})
        refusal(refused, 400, "invalid_value")
        assert refused.json()["error"]["param"] == param
    assert len(closed.desk.actors) == 1


async def test_the_list_of_refused_records_checks_what_it_is_asked(closed: AuthApp) -> None:
    listed = await closed.get("/admin/v1/quarantine?limit=7&reason=schema&source=cam", OPERATOR)
    [row] = listed.json()["data"]
    assert row == {"place": "t:0:1", "limit": 7, "reason": "schema", "source": "cam"}
    assert "counts" not in listed.json()
    counted = await closed.get("/admin/v1/quarantine?counts=true", OPERATOR)
    assert counted.json()["counts"] == {"reason": {"schema": 2}, "source": {"cam": 2}}
    for query in ("limit=0", "limit=501", "reason=nonsense", f"source={'x' * 257}"):
        refusal(await closed.get(f"/admin/v1/quarantine?{query}", OPERATOR), 400, "invalid_value")


async def test_who_is_refused_is_not_listened_to(closed: AuthApp) -> None:
    read = False

    async def body() -> Any:
        nonlocal read
        read = True
        yield b"x"

    scope_seen = await closed.send("POST", "/v1/embeddings", content=body())
    assert scope_seen.status_code == 401
    assert not read


def test_the_start_says_when_clients_need_keys_or_nobody_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(start, "say", said.append)
    Ledger.open(Settings(home=tmp_path).ledger).close()  # which a start does first

    def told(host: str, require: str = "auto") -> str:
        said.clear()
        start._tell_of_keys(Settings(home=tmp_path, serve={"host": host}, access={"require_keys": require}))
        return " ".join(said)

    assert told("127.0.0.1") == ""
    assert "ratchet keys create" in told("0.0.0.0")
    assert "no key is needed to ask the models on 0.0.0.0" in told("0.0.0.0", "never")
    ledger = Ledger.open(Settings(home=tmp_path).ledger)
    ledger.create_key("page", ["infer"], actor="t")
    ledger.close()
    assert told("0.0.0.0") == ""
