from __future__ import annotations

import asyncio
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from fastapi.routing import APIRoute
from prometheus_client import REGISTRY
from pydantic import SecretStr
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from core.access import KEYS_SECONDS, NEW_KEY_SECONDS, Access
from core.artifacts import Artifacts
from core.errors import LedgerUnavailable
from core.ledger import KeyRow, Ledger
from core.settings import Settings
from serving.http.app import openapi
from serving.http.auth import KEY, AuthMiddleware, KeyCopy, needs
from serving.http.client_address import RateLimiter
from tests.support.clock import Clock
from tests.unit.serving.auth_app import OPERATOR, AuthApp, Keys, refusal

PATHS = {
    "deletion_id": "d", "model": "clip", "sample_id": "0" * 64, "space": "s", "topic": "t", "partition": 0, "offset": 0
}  # fmt: skip


def away(*_: object) -> list[KeyRow]:
    raise LedgerUnavailable("no route to host")


@pytest.fixture
def local(keys: Keys, tmp_path: Path) -> AuthApp:
    return AuthApp(keys.ledger, tmp_path, host="127.0.0.1")


async def test_where_others_can_reach_it_every_route_but_health_wants_a_key(closed: AuthApp) -> None:
    async def secret() -> str:
        return "secret"

    closed.app.router.routes.append(APIRoute("/v2/new", secret))
    paths = closed.app.openapi()["paths"]
    routes = [(method, path.format(**PATHS)) for path, item in paths.items() for method in item]
    assert len(routes) > 15
    for method, path in [*routes, ("get", "/v1/nothing"), ("get", "/v2/new")]:
        if path.startswith("/health/"):
            assert needs(path) == ()
            continue
        answer = await closed.send(method.upper(), path)
        assert "ratchet keys create" in refusal(answer, 401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["type"] == "authentication_error"


async def test_the_description_of_the_api_needs_no_key_and_its_page_talks_to_this_server_alone(
    closed: AuthApp,
) -> None:
    page = await closed.get("/docs")
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self' 'sha256-") and "connect-src 'self'" in policy
    urls = re.findall(r"""(?:src|href)="(.*?)"|url: '(.*?)'""", page.text)
    for url in ("".join(pair) for pair in urls):
        assert (await closed.get(f"/{url}")).status_code == 200, url
    assert len(urls) == 4 and (await closed.get("/openapi.json")).json() == openapi()


async def test_on_loopback_all_may_infer_but_not_operate_and_a_wrong_key_is_told_so(local: AuthApp, keys: Keys) -> None:
    token = keys.of("infer")
    assert (await local.get("/v1/models", token)).status_code == 200
    for wrong in (token[:-1], token[:-4] + "zzzz", f"rk_ffffffff_{'0' * 64}"):
        assert "not valid" in refusal(await local.get("/v1/models", wrong), 401, "invalid_api_key")
    for key in ("", "none", "sk-whatever"):
        assert (await local.get("/v1/models", key)).status_code == 200
        refusal(await local.send("POST", "/admin/v1/hold", key, json={"reason": "r"}), 401, "invalid_api_key")
    assert local.desk.actors == []


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-for": "198.51.100.7"}, {"x-forwarded-for": "198.51.100.7, 127.0.0.1"},
        {"x-forwarded-for": "unknown"}, {"x-real-ip": "127.0.0.1"}, {"forwarded": "for=_hidden"}, {"via": "1.1 proxy"},
        {"x-forwarded-proto": "https"},
    ],
)  # fmt: skip
async def test_what_a_local_proxy_forwards_needs_a_key(local: AuthApp, keys: Keys, headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/metrics"):
        assert (await local.send("GET", path, headers=headers)).status_code == 401, path
        assert (await local.send("GET", path, keys.of("infer"), headers=headers)).status_code == 200, path
    assert (await local.send("GET", "/v1/models", headers={"x-forwarded-for": "127.0.0.1"})).status_code == 200


async def test_a_key_opens_what_its_scopes_name_and_the_bootstrap_key_everything(closed: AuthApp, keys: Keys) -> None:
    infer, search, publish, operate = (keys.of(scope) for scope in ("infer", "search", "publish", "operate"))
    held: dict[str, Any] = {"json": {"reason": "r"}}
    assert (await closed.get("/v1/models", infer)).status_code == 200
    assert (await closed.send("POST", "/admin/v1/hold", operate, **held)).status_code == 200
    assert (await closed.get("/v1/samples/some/image", search)).status_code not in (401, 403)
    for key in (publish, operate):
        assert (await closed.get("/admin/v1/quarantine", key)).status_code == 200
        assert (await closed.get("/v1/records/t/0/x", key)).status_code == 400  # no offset
    for path in ("/v1/models", "/admin/v1/quarantine", "/metrics"):
        assert (await closed.get(path, OPERATOR)).status_code == 200
    refusal(await closed.get("/v1/models", OPERATOR + "x"), 401, "invalid_api_key")
    for method, path, key, scope in [
        ("GET", "/v1/models", operate, "`infer`"), ("GET", "/v1/models", search, "`infer`"),
        ("POST", "/v1/search", infer, "`search`"), ("GET", "/v1/samples/some/image", infer, "`search`"),
        ("POST", "/admin/v1/hold", infer, "`operate`"), ("POST", "/admin/v1/hold", publish, "`operate`"),
        ("POST", "/admin/v1/deletions", publish, "`operate`"), ("GET", "/admin/v1/deletions/d1", publish, "`operate`"),
        ("GET", "/admin/v1/quarantine", infer, "`publish` or `operate`"), ("POST", "/v1/feedback", infer, "`feedback`"),
        ("GET", "/v1/records/t/0/0", infer, "`publish` or `operate`"),
    ]:  # fmt: skip
        answer = await closed.send(method, path, key, **held)
        assert scope in refusal(answer, 403, "insufficient_scope")
        assert answer.json()["error"]["type"] == "permission_error"


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


async def test_a_revoked_key_is_refused_and_a_new_one_works_within_seconds(closed: AuthApp, keys: Keys) -> None:
    row, token = keys.ledger.create_key("leaver", ["infer"], actor="t")
    assert (await closed.get("/v1/models", token)).status_code == 200
    keys.ledger.revoke_key(row.id, actor="t", reason="left")
    closed.clock.now += KEYS_SECONDS
    refusal(await closed.get("/v1/models", token), 401, "invalid_api_key")
    closed.clock.now += NEW_KEY_SECONDS / 4
    new = keys.ledger.create_key("fresh", ["infer"], actor="t")[1]
    waiting = asyncio.create_task(closed.get("/v1/models", new))
    while not waiting.done():
        closed.clock.now += NEW_KEY_SECONDS / 4
        await asyncio.sleep(0.01)
    assert (await waiting).status_code == 200


async def test_a_hanging_ledger_holds_nobody_up(closed: AuthApp, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
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
            for _ in range(2):  # the second is not looked for again, and told the same
                refused = await closed.get("/v1/models", new)
                refusal(refused, 503, "unavailable")  # the answer does not say whether it is wrong or revoked
                assert refused.headers["retry-after"]
            for wrong in ("rk_cut", token[:-1] + ("0" if token[-1] != "0" else "1")):
                refusal(await closed.get("/v1/models", wrong), 401, "invalid_api_key")
    finally:
        closed.slow.set()
    monkeypatch.setattr("serving.http.auth.READ_SECONDS", 60.0)
    closed.clock.now += KEYS_SECONDS
    assert (await closed.get("/v1/models", new)).status_code == 200
    refusal(await closed.get("/v1/models", f"rk_{'0' * 8}_{'0' * 64}"), 401, "invalid_api_key")


async def test_a_silent_ledger_makes_no_known_key_that_is_in_use_wait(closed: AuthApp, keys: Keys) -> None:
    """A key that waited for a read of the ledger would wait for half a minute here."""
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


async def test_the_audit_names_the_key_and_its_holder_and_nobody_takes_such_a_name(closed: AuthApp, keys: Keys) -> None:
    operate, path, body = keys.of("operate"), "/admin/v1/hold", {"reason": "r"}
    for key, said in [(operate, ""), (operate, "ann"), (OPERATOR, "j\u00f6rg"), (OPERATOR, "")]:
        raw = cast(Any, said.encode())
        assert (await closed.send("POST", path, key, raw, json=body)).status_code == 200
    for said in ("key:operate-none", "updater", "x" * 101, "a\x07"):
        for key in (OPERATOR, operate):
            refusal(await closed.send("POST", path, key, said, json=body), 400, "invalid_actor")
    assert closed.desk.actors == ["key:operate-none", "key:operate-none/ann", "j\u00f6rg", "operator"]


async def test_who_is_refused_is_not_listened_to(closed: AuthApp) -> None:
    read = False

    async def body() -> Any:
        nonlocal read
        read = True
        yield b"x"

    assert (await closed.send("POST", "/v1/embeddings", content=body())).status_code == 401
    assert not read


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await PlainTextResponse("hello")(scope, receive, send)


class Limited:
    """The guard alone, with a clock that stands still."""

    def __init__(self, auth_app: AuthApp) -> None:
        self.clock = Clock()
        self.guard = AuthMiddleware(hello, auth_app.access, RateLimiter(self.clock))

    async def get(self, key: str = "", path: str = "/v1/models", peer: str = "192.0.2.1") -> httpx.Response:
        transport = httpx.ASGITransport(self.guard, client=(peer, 1))
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as http:
            return await http.get(path)


async def test_a_key_over_its_limit_is_told_when_to_come_again(closed: AuthApp, keys: Keys) -> None:
    auth_app, token, other = Limited(closed), keys.of("infer", limit=3), keys.of("infer", limit=2)
    assert [(await auth_app.get(token)).status_code for _ in range(3)] == [200] * 3
    refused = await auth_app.get(token)
    assert "'infer-3' may make 3 requests a minute" in refusal(refused, 429, "rate_limited")
    assert refused.headers["retry-after"] == "20"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert (await auth_app.get(other)).status_code == 200  # its own bucket
    assert (await auth_app.get(token, "/health/ready")).status_code == 200
    auth_app.clock.now += 20
    assert [(await auth_app.get(token)).status_code for _ in range(2)] == [200, 429]
    assert REGISTRY.get_sample_value("ratchet_http_rate_limited_total", {"caller": "infer-3"}) == 2


async def test_strangers_share_the_limit_of_their_address_and_operators_have_none(keys: Keys, tmp_path: Path) -> None:
    rules = {"require_keys": "never", "anonymous_per_minute": 2, "requests_per_minute": 1}
    auth_app = Limited(AuthApp(keys.ledger, tmp_path, **rules))
    assert [(await auth_app.get(OPERATOR)).status_code for _ in range(5)] == [200] * 5
    assert [(await auth_app.get(keys.of("infer"))).status_code for _ in range(2)] == [200, 429]
    first = [(await auth_app.get(key)).status_code for key in ("", "none", "sk-other")]
    assert first == [200, 200, 429]
    assert (await auth_app.get(peer="192.0.2.2")).status_code == 200
    neighbours = [(await auth_app.get(peer=f"2001:db8::{number}")).status_code for number in range(3)]
    assert neighbours == [200, 200, 429]
    assert (await auth_app.get(peer="2001:db8:0:1::1")).status_code == 200


def test_buckets_are_bounded_and_the_idle_are_forgotten_first() -> None:
    rates = RateLimiter(Clock(), most=3)
    assert rates.take("busy", 1) == 0
    for number in range(100):
        rates.take(f"address:{number}", 5)
        assert rates.take("busy", 1) > 0
        assert len(rates) <= 3


def test_callers_have_their_rate_over_all_processes_and_never_more_than_that_of_a_minute() -> None:
    clock = Clock()
    limiters = [RateLimiter(clock, replicas=2) for _ in range(2)]
    for _ in range(2):
        granted = sum(limiter.take("ann", 10) == 0 for limiter in limiters for _ in range(10))
        assert granted == 10
        clock.now += 3600


class Node:
    """A ledger with the key of ann, and a copy of its keys on the node and in the artifacts."""

    def __init__(self, folder: Path) -> None:
        self.settings = Settings(home=folder, serve={"operator_key": "bootstrap"})
        self.ledger = Ledger.open(self.settings.ledger)
        self.token = self.ledger.create_key("ann", ["infer"], actor="t")[1]
        self.file = folder / "serving" / "keys.json"
        self.artifacts = Artifacts(self.settings.artifacts)

    def keep(self, copy: KeyCopy | None = None) -> None:
        (copy or KeyCopy.of(self.settings)).keep(self.ledger.api_keys())

    def names(self, secret: str = "bootstrap") -> list[str]:
        """Who is known to another process."""
        return [row.name for row in KeyCopy(self.file, self.artifacts, SecretStr(secret)).read()]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    node.keep()
    yield node
    node.ledger.close()


def test_a_process_that_starts_while_the_ledger_is_away_knows_the_clients(node: Node) -> None:
    copy = KeyCopy.of(node.settings)
    leaver = node.ledger.create_key("leaver", ["infer"], actor="t")[1]
    node.keep(copy)
    node.ledger.revoke_key("leaver", actor="t", reason="left")
    node.keep(copy)
    ledger = SimpleNamespace(api_keys=away, touch_keys=away)
    access = Access(ledger, node.settings, recall=KeyCopy.of(node.settings).read)
    caller = access.identify(node.token)
    assert caller is not None and (caller.name, caller.scopes) == ("ann", {"infer"})
    for stranger in (leaver, f"rk_ffffffff_{'0' * 64}"):
        assert access.identify(stranger) is None and access.unread(stranger, came=0.0)


def test_a_new_node_takes_the_copy_of_the_artifacts_and_one_without_artifacts_its_own(node: Node) -> None:
    node.file.unlink()
    assert node.names() == ["ann"]
    node.keep()
    shutil.rmtree(node.settings.artifacts)
    assert node.names() == ["ann"]


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"\xff", b"[" * 100_000, b'{"format": 1, "hmac": "", "keys": []}', b"forged"]
)
def test_any_bytes_and_a_copy_that_was_changed_or_signed_with_another_key_name_nobody(node: Node, data: bytes) -> None:
    assert node.names("another") == []
    if data == b"forged":
        data = node.file.read_bytes().replace(b'"infer"', b'"operate"')
    node.artifacts.write_bytes(KEY, data)
    assert node.names() == ["ann"], "of the node's own"
    node.file.write_bytes(data)
    assert node.names() == []


def test_it_has_no_secret_and_a_nodes_is_its_owners(node: Node) -> None:
    assert node.file.stat().st_mode & 0o777 == 0o600
    for text in (node.file.read_text(), node.artifacts.read_bytes(KEY).decode()):
        assert "ann" in text and node.token.split("_")[2] not in text and "bootstrap" not in text


def test_a_copy_that_could_not_be_written_is_written_later(node: Node) -> None:
    shutil.rmtree(node.file.parent)
    shutil.rmtree(node.settings.artifacts)
    node.file.parent.write_text("a file where the folder should be")
    copy = KeyCopy.of(node.settings)
    node.keep(copy)
    assert node.names() == []
    node.file.parent.unlink()
    node.keep(copy)
    assert node.names() == ["ann"]
