"""One answer of a page for all visitors of a public console, so that the ledger is asked as often for a hundred screens
as for one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from functools import partial
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ops.console.sessions import Session
from serving.http.health import Recent

SECONDS: Final = 5.0
"""How old an answer may be."""
MOST: Final = 128
"""Answers that are kept, the last ones."""
UNSHARED: Final = ("/health/", "/static/")
VARY: Final = (b"hx-request", b"hx-target", b"hx-current-url")
"""Headers that a page depends on."""
Key = tuple[str, str, bytes, tuple[bytes, ...]]


class SharedPages:
    """Whoever asks for a page within SECONDS gets the same answer, made for a visitor without a key. Pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._answers: OrderedDict[Key, Recent[list[Message]]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"].startswith(UNSHARED):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        key = (scope["method"], scope["path"], scope["query_string"], tuple(headers.get(name, b"") for name in VARY))
        answer = self._answers.setdefault(key, Recent(partial(self._messages, scope), SECONDS))
        self._answers.move_to_end(key)
        while len(self._answers) > MOST:
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
                await asyncio.Event().wait()  # no visitor of many goes away for all
            return body.pop()

        async def send(message: Message) -> None:
            messages.append(message)

        await self.app({**scope, "state": {**scope["state"], "session": Session.new()}}, receive, send)
        return messages
