"""Public mode: a read-only console without keys, for a team's screen. It never shows keys, people's names, operators'
texts, error messages or source names, nor anything of a sample unless ``console.public_samples`` is set. It has no
forms and no sessions, and accepts only GET."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ops.console.security import Session
from serving.http.client_address import RateLimiter, TrustedProxies, address, set_client
from serving.http.recent import Recent

SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
SPEAKERS: Final = frozenset({"updater", "guard"})
"""Actors whose reasons Ratchet makes from names and numbers; others may write anything."""
PAGES: Final = ("/", "/releases", "/models", "/gate", "/stream", "/budget")
REFRESH_SECONDS: Final = 10
SHARED_SECONDS: Final = 5.0
MOST_SHARED: Final = 128
VARY: Final = (b"hx-request", b"hx-target", b"hx-current-url")
"""Headers that a page depends on."""
Key = tuple[str, str, bytes, tuple[bytes, ...]]


class ReadOnly:
    """Refuses methods that could change something, and limits requests per address. Pure ASGI. Probes under
    ``/health/`` are not counted; ``trusted_proxies``: networks whose ``X-Forwarded-For`` is believed."""

    def __init__(self, app: ASGIApp, requests_per_minute: int, trusted_proxies: Sequence[str] = ()) -> None:
        self.app = app
        self._per_minute = requests_per_minute
        self._limiter = RateLimiter()
        self._proxies = TrustedProxies(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["no_cookie"] = True
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        if scope["method"] not in SAFE_METHODS:
            return PlainTextResponse("this console is public and read-only.", 403)
        if scope["path"].startswith("/health/"):
            return None
        set_client(scope, self._proxies)
        wait = self._limiter.take(address(scope), self._per_minute)
        if wait:
            return PlainTextResponse("too many requests.", 429, {"retry-after": str(math.ceil(wait))})
        return None


class SharedPages:
    """Shares one answer per page among all visitors for SHARED_SECONDS, made for a visitor without a key. Pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._answers: OrderedDict[Key, Recent[list[Message]]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(("/health/", "/static/")):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        key = (scope["method"], scope["path"], scope["query_string"], tuple(headers.get(name, b"") for name in VARY))
        answer = self._answers.setdefault(key, Recent(partial(self._messages, scope), SHARED_SECONDS))
        self._answers.move_to_end(key)
        while len(self._answers) > MOST_SHARED:
            self._answers.popitem(last=False)
        try:
            messages = await answer.get()
        except Exception:  # the next visitor asks again
            if self._answers.get(key) is answer:
                del self._answers[key]
            raise
        for message in messages:
            await send(dict(message))

    async def _messages(self, scope: Scope) -> list[Message]:
        messages: list[Message] = []
        body: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]

        async def receive() -> Message:
            if not body:
                await asyncio.Event().wait()  # a shared answer has no client that disconnects
            return body.pop()

        async def send(message: Message) -> None:
            messages.append(message)

        await self.app({**scope, "state": {**scope["state"], "session": Session.new()}}, receive, send)
        return messages


def without_samples(report: Mapping[str, Any]) -> dict[str, Any]:
    """A gate report without regressions and pairs of similar images, which show samples."""
    diagnostics = report.get("diagnostics")
    suites = [{**suite, "worst": []} for suite in report.get("suites") or ()]
    if not diagnostics:
        return {**report, "suites": suites}
    pairs = {suite: {**pair, "shown": []} for suite, pair in diagnostics["pairs"].items()}
    return {**report, "suites": suites, "diagnostics": {**diagnostics, "pairs": pairs}}
