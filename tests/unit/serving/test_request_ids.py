"""Every answer has the id of its request, and so do the lines of the log that are about it."""

from __future__ import annotations

import json
import logging
import re

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from core.log_format import JsonFormatter
from core.request_context import current
from serving.http.request_ids import ALPHABET, RequestIds, middlewares
from tests.unit.serving.auth_app import AuthApp
from tests.unit.serving.scripted_vlms import ScriptedVlms, app_of, app_state

CHAT = {"model": "vlm", "messages": [{"role": "user", "content": "hello"}]}
NEW = re.compile(r"[0-9a-f]{32}")


def client(vlms: ScriptedVlms | None = None) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(app_state(vlms)), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", CHAT, 200),
        ("POST", "/v1/chat/completions", {**CHAT, "stream": True}, 200),
        ("POST", "/v1/chat/completions", {"model": "vlm"}, 400),
        ("POST", "/v1/embeddings", {"model": "clip", "input": "a"}, 500),  # there are no encoders here
        ("GET", "/v1/models", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/no/such/route", None, 404),
        ("GET", "/v1/embeddings", None, 405),
    ],
)
async def test_an_answer_has_its_clients_id_once_and_one_without_gets_a_new_one(
    method: str, path: str, body: object, status: int
) -> None:
    async with client(ScriptedVlms()) as http:
        own = await http.request(method, path, json=body, headers={"x-request-id": "my-id:1"})
        new = [await http.request(method, path, json=body) for _ in range(2)]
    assert (own.status_code, own.headers.get_list("x-request-id")) == (status, ["my-id:1"])
    ids = [answer.headers["x-request-id"] for answer in new]
    assert all(map(NEW.fullmatch, ids)) and ids[0] != ids[1]


async def test_refusals_before_any_route_have_one_too(closed: AuthApp) -> None:
    answers = [await closed.get("/v1/models"), await closed.get("/v1/models", "rk_00000000_0")]
    assert [answer.status_code for answer in answers] == [401, 401]
    assert all(NEW.fullmatch(answer.headers["x-request-id"]) for answer in answers)


@pytest.mark.parametrize("sent", ["", "a" * 129, "two words", "<script>", 'a"b', "a;b", "\xe9", "a,b"])
async def test_an_id_that_is_too_long_or_has_other_characters_is_replaced(sent: str) -> None:
    async with client() as http:
        answer = await http.get("/v1/models", headers=[(b"x-request-id", sent.encode("latin-1"))])
    assert NEW.fullmatch(answer.headers["x-request-id"])


async def test_around_rays_middleware_there_is_still_one_id_and_it_is_the_sane_one() -> None:
    seen: list[str] = []

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope["headers"])[b"x-request-id"].decode())
        await PlainTextResponse("ok")(scope, receive, send)

    async def rays(scope: Scope, receive: Receive, send: Send) -> None:
        """As in ray.serve._private.http_util.RequestIdMiddleware: the client's id, unchecked, once more."""
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
        async with client(ScriptedVlms(failure=RuntimeError("out of order"))) as http:
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


def test_an_id_needs_no_escaping() -> None:
    taken = [chr(code) for code in range(128) if re.fullmatch(f"[{ALPHABET}]", chr(code))]
    assert not set(taken) & set("\"'<>&\\ ,;%{}()\n\r\t")
