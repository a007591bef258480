"""How often a caller may come: the guard of the real application, and its buckets."""

from __future__ import annotations

from pathlib import Path

import httpx
from prometheus_client import REGISTRY
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serving.http.auth import AuthMiddleware
from serving.http.client_address import RateLimiter
from tests.unit.serving.auth_app import OPERATOR, AuthApp, Clock, Keys, refusal


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


async def test_the_operator_is_never_limited(keys: Keys, tmp_path: Path) -> None:
    auth_app = Limited(AuthApp(keys.ledger, tmp_path, requests_per_minute=1))
    assert [(await auth_app.get(OPERATOR)).status_code for _ in range(5)] == [200] * 5
    assert [(await auth_app.get(keys.of("infer"))).status_code for _ in range(2)] == [200, 429]


async def test_strangers_share_the_limit_of_their_address(keys: Keys, tmp_path: Path) -> None:
    auth_app = Limited(AuthApp(keys.ledger, tmp_path, require_keys="never", anonymous_per_minute=2))
    first = [(await auth_app.get(key)).status_code for key in ("", "none", "sk-other")]
    assert first == [200, 200, 429]
    assert (await auth_app.get(peer="192.0.2.2")).status_code == 200
    neighbours = [(await auth_app.get(peer=f"2001:db8::{number}")).status_code for number in range(3)]
    assert neighbours == [200, 200, 429]
    assert (await auth_app.get(peer="2001:db8:0:1::1")).status_code == 200


def test_buckets_are_bounded_and_the_idle_are_forgotten_first() -> None:
    clock = Clock()
    rates = RateLimiter(clock, most=3)
    assert rates.take("busy", 1) == 0
    for number in range(100):
        rates.take(f"address:{number}", 5)
        assert rates.take("busy", 1) > 0
        assert len(rates) <= 3


def test_a_bucket_never_holds_more_than_a_minute_of_requests() -> None:
    clock = Clock()
    rates = RateLimiter(clock)
    rates.take("a", 2)
    clock.now += 3600
    assert [rates.take("a", 2) > 0 for _ in range(3)] == [False, False, True]
    clock.now -= 7200  # clocks of tests may go back; a bucket is never in debt for that
    assert rates.take("b", 0) == 0
