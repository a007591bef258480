from __future__ import annotations

import json
import logging
import re
from typing import Any

import httpx
import pytest
from fastapi import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from core.access import OPERATOR, Principal
from core.log_format import JsonFormatter
from core.request_context import current
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from serving.http.app_state import AppState, routing_key
from serving.http.errors import ApiError
from serving.http.request_ids import RequestIds, middlewares
from serving.releases.types import ReleaseSnapshot
from tests.unit.serving.auth_app import AuthApp
from tests.unit.serving.scripted_vlms import ScriptedVlms, about_image, app_of, app_state, client

CHAT = {"model": "vlm", "messages": [{"role": "user", "content": "hello"}]}
NEW = re.compile(r"[0-9a-f]{32}")


def app_client(vlms: ScriptedVlms | None = None, at: AppState | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(at or app_state(vlms)), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", CHAT, 200), ("POST", "/v1/chat/completions", {**CHAT, "stream": True}, 200),
        ("POST", "/v1/chat/completions", {"model": "vlm"}, 400),
        ("POST", "/v1/embeddings", {"model": "clip", "input": "a"}, 500),  # there are no encoders here
        ("GET", "/metrics", None, 200), ("GET", "/no/such/route", None, 404), ("GET", "/v1/embeddings", None, 405),
    ],
)  # fmt: skip
async def test_an_answer_has_its_clients_id_once_and_one_without_gets_a_new_one(
    method: str, path: str, body: object, status: int
) -> None:
    async with app_client(ScriptedVlms()) as http:
        own = await http.request(method, path, json=body, headers={"x-request-id": "my-id:1"})
        new = [await http.request(method, path, json=body) for _ in range(2)]
    assert (own.status_code, own.headers.get_list("x-request-id")) == (status, ["my-id:1"])
    ids = [answer.headers["x-request-id"] for answer in new]
    assert all(map(NEW.fullmatch, ids)) and ids[0] != ids[1]


async def test_refusals_before_any_route_have_one_too_and_ids_that_are_not_sane_are_replaced(closed: AuthApp) -> None:
    answers = [await closed.get("/v1/models"), await closed.get("/v1/models", "rk_00000000_0")]
    assert [answer.status_code for answer in answers] == [401, 401]
    async with app_client() as http:
        answers += [
            await http.get("/v1/models", headers=[(b"x-request-id", sent.encode("latin-1"))])
            for sent in ("", "a" * 129, "two words", "<script>", 'a"b', "a;b", "\xe9", "a,b")
        ]
    assert all(NEW.fullmatch(answer.headers["x-request-id"]) for answer in answers)


async def test_around_rays_middleware_there_is_still_one_id_and_it_is_the_sane_one() -> None:
    seen: list[str] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"])[b"x-request-id"].decode())
        await PlainTextResponse("ok")(scope, receive, send)

    async def rays(scope: Scope, receive: Receive, send: Send) -> None:
        """As in ray.serve._private.http_util.RequestIdMiddleware: adds the client's ID again, unchecked."""
        own = dict(scope["headers"])[b"x-request-id"]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"X-Request-ID", own))
            await send(message)

        await application(scope, receive, send_with_id)

    (middleware,) = middlewares()
    assert middleware.cls is RequestIds
    transport = httpx.ASGITransport(RequestIds(rays))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        answer = await http.get("/", headers={"x-request-id": "not sane"})
    assert answer.headers.get_list("x-request-id") == seen
    assert NEW.fullmatch(seen[0])


async def test_lines_about_a_request_have_its_id_release_and_adapter() -> None:
    lines: list[str] = []
    before = current()
    formatter = JsonFormatter({"role": "ingress"})

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(formatter.format(record))

    handler = Keep()
    logging.getLogger("ratchet.http").addHandler(handler)
    try:
        async with app_client(ScriptedVlms(failure=RuntimeError("out of order"))) as http:
            answer = await http.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": "abc"})
            await http.post("/v1/embeddings", json={"model": "clip@2", "input": "a"}, headers={"x-request-id": "def"})
    finally:
        logging.getLogger("ratchet.http").removeHandler(handler)
    fields = [json.loads(line) for line in lines]
    names = ("request_id", "release", "adapter")
    assert [tuple(each[name] for name in names) for each in fields] == [("abc", 3, "vlm-b"), ("def", 2, "clip-a")]
    assert "out of order" in fields[0]["traceback"]
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server made a mistake; its log says which (request abc)."
    assert current() is before


CANARY = (
    ReleaseSnapshot(4, "clip-a", "i3", "t3", "vlm-c", share=0.3),
    ReleaseSnapshot(3, "clip-a", "i3", "t3", "vlm-b"),
)


def request(caller: Principal | None = None, **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "state": {} if caller is None else {"principal": caller}})


def test_a_caller_is_its_api_key_else_what_it_says_of_itself_else_the_request() -> None:
    told = {"authorization": "Bearer secret", "x_ratchet_key": "mine", "x_request_id": "r1"}
    assert routing_key(request(Principal("bot", frozenset(), key_id="0123abcd"), **told), "ann") == "0123abcd"
    assert routing_key(request(OPERATOR, **told), "ann") == "mine"
    del told["x_ratchet_key"]
    assert routing_key(request(OPERATOR, **told), "ann") == "ann"
    assert routing_key(request(Principal("anonymous", frozenset(), "anonymous"), **told)) == "r1"
    assert routing_key(request()) != routing_key(request())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "failed"),
    [
        (None, 0), (AdapterUnservable("gone"), 1), (ApiError(500, "not finite"), 1), (ZeroDivisionError(), 1),
        (Unavailable("no replica"), 0), (DeadlineExceeded("late"), 0), (QueueFull("full"), 0),
        (InvalidRequest("too long"), 0), (ApiError(400, "wrong"), 0),
    ],
)  # fmt: skip
async def test_every_request_is_counted_for_its_release_and_failures_but_for_those_of_clients_and_load(
    stream: bool, failure: Exception | None, failed: int
) -> None:
    at = app_state(ScriptedVlms(failure=failure, fails_at=1))
    async with app_client(at=at) as http:
        await http.post("/v1/chat/completions", json={"messages": about_image(), "stream": stream})
    counted = at.admission.answered()[3]
    assert (counted.requests, counted.failed) == (1, failed)


async def test_openais_user_is_answered_by_one_side_and_the_header_says_which() -> None:
    at = app_state(ScriptedVlms())
    at.admission.adopt(CANARY)
    seen: dict[str, set[str]] = {}
    async with client(at) as http:
        for number in range(60):
            body: dict[str, Any] = {"messages": about_image(), "user": f"user-{number % 20}"}
            answer = await http.post("/v1/chat/completions", json=body)
            told = (answer.headers["x-ratchet-release"], answer.json()["model"], answer.headers["x-ratchet-adapter"])
            assert told in {("4", "vlm@4", "vlm-c"), ("3", "vlm@3", "vlm-b")}
            seen.setdefault(body["user"], set()).add(told[0])
    assert {len(sides) for sides in seen.values()} == {1}
    assert set.union(*seen.values()) == {"3", "4"}


@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/clip", "/v1/models/none", "/health/ready/vlm", "/v1/nothing", "/v1/embeddings"]
)
async def test_head_is_answered_as_get_without_a_body(path: str) -> None:
    async with client(app_state(None)) as http:
        whole, head = await http.get(path), await http.head(path)
    assert head.status_code == whole.status_code
    assert head.headers["content-length"] == whole.headers["content-length"]
    assert head.content == b""
