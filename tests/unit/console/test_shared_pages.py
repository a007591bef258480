"""Visitors of a public console share answers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from ops.console.sessions import Session
from ops.console.shared_pages import MOST, SECONDS, SharedPages


class Pages:
    """Says how often it was asked, and with which key."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fails = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        assert await request.body() == b""
        self.calls.append((request.url.path, scope["state"]["session"].key))
        await asyncio.sleep(0)
        if self.fails:
            raise OSError("the ledger is away")
        await PlainTextResponse(f"answer {len(self.calls)}", headers={"x-page": scope["path"]})(scope, receive, send)


def visitor(app: Any, key: str = "") -> httpx.AsyncClient:
    async def with_session(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"] = {"session": Session.new(key)}
        await app(scope, receive, send)

    return httpx.AsyncClient(transport=httpx.ASGITransport(with_session), base_url="http://screen")


async def test_visitors_at_once_get_one_answer_that_was_made_without_a_key() -> None:
    pages = Pages()
    async with visitor(SharedPages(pages), key="of an operator") as screen:
        answers = await asyncio.gather(*(screen.get("/releases") for _ in range(20)))
    assert {answer.text for answer in answers} == {"answer 1"} and answers[-1].headers["x-page"] == "/releases"
    assert pages.calls == [("/releases", "")]


async def test_another_page_a_part_of_it_and_a_later_visitor_have_answers_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pages = Pages()
    async with visitor(SharedPages(pages)) as screen:
        for url, headers in (("/", {}), ("/gate", {}), ("/gate?page=2", {}), ("/gate", {"hx-request": "true"})):
            await screen.get(url, headers=headers)
        assert len(pages.calls) == 4
        now = time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: now() + SECONDS)
        assert (await screen.get("/gate")).text == "answer 5"


async def test_a_failure_and_a_probe_are_not_shared() -> None:
    pages = Pages()
    async with visitor(SharedPages(pages)) as screen:
        pages.fails = True
        with pytest.raises(OSError, match="away"):
            await screen.get("/")
        pages.fails = False
        assert (await screen.get("/")).text == "answer 2"
        await screen.get("/health/live")
        await screen.get("/health/live")
    assert len(pages.calls) == 4


async def test_answers_that_are_kept_are_bounded() -> None:
    shared = SharedPages(Pages())
    async with visitor(shared) as screen:
        for number in range(MOST + 10):
            await screen.get(f"/?{number}")
    assert len(shared._answers) == MOST
