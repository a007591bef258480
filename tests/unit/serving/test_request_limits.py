"""Bounds of a request, in the middlewares around an application that answers with the size of the body."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from core.settings.serving import Serve
from serving.http import request_bodies
from serving.http.request_bodies import RequestBodies, RequestLimits
from tests.support.clock import Clock
from tests.unit.serving.auth_app import refusal
from tests.unit.serving.scripted_vlms import RawRequest, skip


class EchoApp:
    """Answers at once or, with ``waits``, when ``go`` is set."""

    def __init__(self, waits: bool = False) -> None:
        self.go = asyncio.Event()
        if not waits:
            self.go.set()
        self.clients: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.clients.append(scope["client"][0])
        size, more = 0, True
        while more:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
        await self.go.wait()
        await PlainTextResponse(str(size))(scope, receive, send)


def limited(app: ASGIApp, proxies: Sequence[str] = (), **serve: Any) -> RequestLimits:
    settings = Serve(**{"max_image_bytes": 2048, **serve})
    return RequestLimits(RequestBodies(app, settings), settings, proxies)


def client(
    app: ASGIApp | None = None, peer: str = "127.0.0.1", proxies: Sequence[str] = (), **serve: Any
) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(limited(app or EchoApp(), proxies, **serve), client=(peer, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


def ask(app: ASGIApp, *paths: str, peer: str = "127.0.0.1") -> list[RawRequest]:
    return [RawRequest(app, path, b"", peer) for path in paths]


async def settled() -> None:
    """Let everything run that does not need time to pass."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_body_is_counted_with_and_without_a_length() -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 1000

    async with client() as http:
        assert (await http.post("/", content=b"x" * 4096)).text == "4096"
        declared = await http.post("/", content=b"x" * 4097)
        streamed = await http.post("/", content=chunks())
        odd = await http.post("/", content=b"x", headers={"content-length": b"\xb2"})
    for answer in (declared, streamed, odd):
        assert "serve.max_image_bytes" in refusal(answer, 413, "body_too_large")


async def test_a_compressed_body_is_refused_and_a_plain_one_that_says_so_is_not() -> None:
    async with client() as http:
        packed, *plain = [
            await http.post("/", content=b"x", headers={"content-encoding": value})
            for value in ("gzip", "Identity", "", " ")
        ]
    assert "gzip" in refusal(packed, 415, "content_encoding")
    assert packed.headers["accept-encoding"] == "identity"
    assert [answer.text for answer in plain] == ["1"] * 3


async def test_silent_requests_hold_no_slot() -> None:
    app = limited(EchoApp(), queue=4)
    silent = [RawRequest(app, peer="127.0.0.2") for _ in range(300)]
    await settled()
    [good] = ask(app, "/v1/embeddings")
    assert await good.status() == 200
    for request in silent:
        request.hang_up()
    await asyncio.gather(*(request.task for request in silent))


async def test_a_body_that_does_not_come_is_answered_408() -> None:
    request = RawRequest(limited(EchoApp()))
    await settled()
    skip(request_bodies.GRACE_SECONDS)
    assert await request.status() == 408
    assert "body_timeout" in request.body()
    assert (b"connection", b"close") in request.sent[0]["headers"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(request_bodies.time, "monotonic", made)
    return made


async def test_a_slow_body_is_408_and_one_at_the_rate_is_not(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_bodies, "BODY_BYTES_PER_SECOND", 100)
    app = limited(EchoApp())
    slow, steady = RawRequest(app), RawRequest(app, length=2000)
    for second in range(1, 11):
        await settled()
        clock.now += 1
        if not slow.task.done():
            slow.send_body(b"x")
        steady.send_body(b"x" * 200, more=second < 10)
    assert await slow.status() == 408
    assert (await steady.status(), steady.body()) == (200, "2000")


async def test_a_whole_body_has_a_time_limit_whatever_its_rate(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_bodies, "BODY_BYTES_PER_SECOND", 1)
    monkeypatch.setattr(request_bodies, "BODY_SECONDS", 8)
    request = RawRequest(limited(EchoApp()), length=4000)
    for seconds in (4, 3, 2):
        request.send_body(b"x" * 1000)
        await settled()
        clock.now += seconds
    assert await request.status() == 408


async def test_bodies_share_a_budget_that_is_given_back() -> None:
    app = limited(EchoApp(), ingress_replicas=16, caller_share=0.5, max_image_bytes=2000)
    first, second = RawRequest(app, peer="127.0.0.2"), RawRequest(app, peer="127.0.0.2")
    first.send_body(b"x" * 1500)
    await settled()
    second.send_body(b"x" * 1000)
    assert await second.status() == 429  # 2,000 is one caller's share
    third, fourth = RawRequest(app, peer="127.0.0.3"), RawRequest(app, peer="127.0.0.4")
    third.send_body(b"x" * 2000)
    await settled()
    fourth.send_body(b"x" * 1000)
    assert await fourth.status() == 503
    assert (b"retry-after", b"1") in fourth.sent[0]["headers"]
    for request in (first, third):
        request.hang_up()
        assert await request.status() == 499
    again = RawRequest(app, peer="127.0.0.2")
    again.send_body(b"x" * 2000, more=False)
    assert await again.status() == 200


@pytest.mark.parametrize(
    ("paths", "refused"),
    [
        (["/v1/embeddings"] * 4 + ["/admin/v1/rollback", "/health/live", "/metrics"], 3),
        (["/v1/search"] * 4 + ["/v1/embeddings"] * 3, 3),
        (["/v1/samples/ab/image"] * 4 + ["/v1/embeddings"] * 3, 3),
        (["/admin/v1/status"] * 3 + ["/admin/v1/rollback"], 2),
    ],
    ids=["operators and probes", "searches that wait for a store", "images of samples", "a rollback"],
)
async def test_what_waits_leaves_other_kinds_of_requests_their_slots(
    paths: list[str], refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_bodies, "OPERATOR_SLOTS", 2)
    echo = EchoApp(waits=True)
    requests = ask(limited(echo, queue=4, caller_share=0.75), *paths)
    await settled()
    assert [number for number, request in enumerate(requests) if request.task.done()] == [refused]
    echo.go.set()
    assert [await request.status() for request in requests] == [200] * refused + [429] + [200] * (
        len(paths) - refused - 1
    )


async def test_one_caller_leaves_slots_to_the_others() -> None:
    echo = EchoApp(waits=True)
    app = limited(echo, queue=4, caller_share=0.75)
    greedy = ask(app, *["/v1/embeddings"] * 4, peer="127.0.0.2")
    others = ask(app, "/v1/models", "/v1/models")
    await settled()
    assert [request.task.done() for request in (*greedy, *others)] == [False, False, False, True, False, True]
    assert [await greedy[3].status(), await others[1].status()] == [429, 429]  # all four are taken
    echo.go.set()
    assert await others[0].status() == 200


async def test_an_answer_that_is_not_read_gives_its_slot_back() -> None:
    app = limited(EchoApp(), queue=1, caller_share=1, deadline_seconds=1)
    [unread] = ask(app, "/v1/embeddings")
    unread.reads.clear()
    await settled()
    skip(1 + request_bodies.SEND_SECONDS)
    await unread.task
    [good] = ask(app, "/v1/models")
    assert await good.status() == 200


async def test_other_machines_are_refused_when_the_host_is_loopback() -> None:
    async with client(peer="203.0.113.9") as http:
        refusal(await http.get("/"), 403, "not_local")
    async with client(peer="203.0.113.9", host="0.0.0.0") as http:
        assert (await http.get("/")).status_code == 200


OURS = ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.0.0.2", ""]
OTHERS = ["evil.example:8000", "localhost.evil.example", "192.0.2.1", "[2001:db8::1]", "127.1"]


@pytest.mark.parametrize("host", [*OURS, *OTHERS])
async def test_names_of_this_machine_and_listed_ones_are_answered_and_others_refused(host: str) -> None:
    async def ask_by_name(**serve: Any) -> int:
        async with client(**serve) as http:
            answer = await http.get("/", headers={"host": host})
        if answer.status_code != 200:
            refusal(answer, 403, "host_not_allowed")
        return answer.status_code

    listed = ["evil.example", "localhost.evil.example", "192.0.2.1"]
    assert await ask_by_name() == (200 if host in OURS else 403)
    assert await ask_by_name(allowed_hosts=listed) == (403 if host in OTHERS[3:] else 200)
    assert await ask_by_name(host="0.0.0.0") == 200


async def test_x_forwarded_for_counts_only_from_a_proxy_of_ours() -> None:
    said = [("x-forwarded-for", "192.0.2.9, 198.51.100.7"), ("x-forwarded-for", "127.0.0.3")]
    direct, behind = EchoApp(), EchoApp()
    async with client(direct, host="0.0.0.0", peer="203.0.113.9", proxies=["127.0.0.0/8"]) as http:
        await http.get("/", headers=said)
    async with client(behind, peer="127.0.0.1", proxies=["127.0.0.0/8"]) as http:
        for headers in (said, [("x-forwarded-for", "unknown")], [("x-forwarded-for", "::ffff:192.0.2.5")]):
            await http.get("/", headers=headers)
    assert direct.clients == ["203.0.113.9"]
    assert behind.clients == ["198.51.100.7", "127.0.0.1", "::ffff:192.0.2.5"]
