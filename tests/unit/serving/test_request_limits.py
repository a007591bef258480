from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import ASGIApp

from serving.http import request_bodies
from tests.support.clock import Clock
from tests.unit.serving.auth_app import refusal
from tests.unit.serving.echo_app import EchoApp, RawRequest, client, limited
from tests.unit.serving.scripted_vlms import skip


def ask(app: ASGIApp, *paths: str, peer: str = "127.0.0.1") -> list[RawRequest]:
    made = [RawRequest(app, path, peer, length=0) for path in paths]
    for request in made:
        request.send_body(b"", more=False)
    return made


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
        packed = await http.post("/", content=b"x", headers={"content-encoding": "gzip"})
        plain = [
            await http.post("/", content=b"x", headers={"content-encoding": value}) for value in ("Identity", "", " ")
        ]
    assert "gzip" in refusal(packed, 415, "content_encoding")
    assert packed.headers["accept-encoding"] == "identity"
    assert [answer.text for answer in plain] == ["1"] * 3


async def test_silent_requests_hold_no_slot() -> None:
    app = limited(EchoApp(), queue=4)
    silent = [RawRequest(app, peer="127.0.0.2") for _ in range(300)]
    await settled()
    good = RawRequest(app, length=2)
    good.send_body(b"ok", more=False)
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


async def test_one_byte_a_second_is_too_slow_and_a_body_at_the_least_rate_is_not(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert await steady.status() == 200
    assert steady.body() == "2000"


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


async def test_one_caller_leaves_slots_to_the_others_and_operators_have_their_own() -> None:
    echo = EchoApp(waits=True)
    app = limited(echo, queue=4, caller_share=0.75)
    greedy = ask(app, *["/v1/embeddings"] * 4, peer="127.0.0.2")
    await settled()
    [refused] = [request for request in greedy if request.task.done()]
    assert await refused.status() == 429
    first, second, rollback = others = ask(app, "/v1/models", "/v1/models", "/admin/v1/rollback")
    await settled()
    assert [request.task.done() for request in others] == [False, True, False]
    assert await second.status() == 429  # all four are taken
    echo.go.set()
    assert [await first.status(), await rollback.status()] == [200, 200]


@pytest.mark.parametrize("path", ["/v1/search", "/v1/samples/ab/image"])
async def test_searches_that_wait_for_a_store_leave_embeddings_their_slots(path: str) -> None:
    echo = EchoApp(waits=True)
    app = limited(echo, queue=4, caller_share=0.75)
    searches, embeddings = ask(app, *[path] * 4), ask(app, *["/v1/embeddings"] * 3)
    await settled()
    assert [request.task.done() for request in searches] == [False, False, False, True]
    assert await searches[3].status() == 429
    echo.go.set()
    assert [await request.status() for request in embeddings] == [200, 200, 200]


async def test_a_rollback_has_a_slot_while_other_operator_calls_hold_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_bodies, "OPERATOR_SLOTS", 2)
    echo = EchoApp(waits=True)
    calls = ask(limited(echo), *["/admin/v1/status"] * 3, "/admin/v1/rollback")
    await settled()
    assert [request.task.done() for request in calls] == [False, False, True, False]
    echo.go.set()
    assert await calls[-1].status() == 200


async def test_an_answer_that_is_not_read_gives_its_slot_back() -> None:
    app = limited(EchoApp(), queue=1, caller_share=1, deadline_seconds=1)
    unread = RawRequest(app, length=0)
    unread.reads.clear()
    unread.send_body(b"", more=False)
    await settled()
    skip(1 + request_bodies.SEND_SECONDS)
    await unread.task
    [good] = ask(app, "/v1/models")
    assert await good.status() == 200


async def test_health_and_metrics_take_no_slot() -> None:
    echo = EchoApp(waits=True)
    app = limited(echo, queue=1)
    busy = ask(app, "/v1/models")
    await settled()
    health = ask(app, "/health/live", "/metrics")
    echo.go.set()
    assert [await request.status() for request in [*health, *busy]] == [200, 200, 200]


async def test_other_machines_are_refused_when_the_host_is_loopback() -> None:
    async with client(peer="203.0.113.9") as http:
        refusal(await http.get("/"), 403, "not_local")
    async with client(peer="203.0.113.9", host="0.0.0.0") as http:
        assert (await http.get("/")).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "127.0.0.2", ""])
async def test_names_of_this_machine_are_answered(host: str) -> None:
    async with client() as http:
        assert (await http.get("/", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8000", "localhost.evil.example", "192.0.2.1", "[2001:db8::1]", "127.1"])
async def test_a_name_that_was_made_to_resolve_to_loopback_is_refused(host: str) -> None:
    async with client() as http:
        refusal(await http.get("/", headers={"host": host}), 403, "host_not_allowed")
    async with client(allowed_hosts=["evil.example", "localhost.evil.example", "192.0.2.1"]) as http:
        allowed = (await http.get("/", headers={"host": host})).status_code
    assert allowed == (200 if host[0] in "el1" and host != "127.1" else 403)
    async with client(host="0.0.0.0") as http:
        assert (await http.get("/", headers={"host": host})).status_code == 200


async def test_x_forwarded_for_counts_only_from_a_proxy_of_ours() -> None:
    said = [("x-forwarded-for", "192.0.2.9, 198.51.100.7"), ("x-forwarded-for", "127.0.0.3")]
    direct, behind = EchoApp(), EchoApp()
    async with client(direct, host="0.0.0.0", peer="203.0.113.9", proxies=["127.0.0.0/8"]) as http:
        await http.get("/", headers=said)
    async with client(behind, peer="127.0.0.1", proxies=["127.0.0.0/8"]) as http:
        await http.get("/", headers=said)
        await http.get("/", headers={"x-forwarded-for": "unknown"})
        await http.get("/", headers={"x-forwarded-for": "::ffff:192.0.2.5"})
    assert direct.clients == ["203.0.113.9"]
    assert behind.clients == ["198.51.100.7", "127.0.0.1", "::ffff:192.0.2.5"]
