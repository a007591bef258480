"""Gives each request an id: its client's own, or a new one. The answer has it in ``x-request-id``, whatever the answer.

Pure ASGI, around everything else. HAProxy, where it is in front, has given the id by then (:mod:`serving.ray.haproxy`),
and puts it on the answers that it makes itself. Ray Serve carries it to the replicas that the request is passed on to.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from typing import Final

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core import request_context

HEADER: Final = "x-request-id"
MAX_CHARS: Final = 128
ALPHABET: Final = "A-Za-z0-9._~:+/=@-"
"""Of UUIDs, ULIDs, base64 and the ids of the usual proxies; nothing that a log or a page has to escape."""
_ID = re.compile(rf"[{ALPHABET}]{{1,{MAX_CHARS}}}".encode())
_NAME = HEADER.encode()


class RequestIds:
    """Also takes an id out of the request that is too long, or has other characters, and puts the new one there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = next((value for name, value in scope["headers"] if name == _NAME), b"")
        if _ID.fullmatch(request_id) is None:
            request_id = uuid.uuid4().hex.encode()
            scope["headers"] = [*_others(scope["headers"]), (_NAME, request_id)]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A copy: what is inside may send its own again.
                message = {**message, "headers": [*_others(message.get("headers", ())), (_NAME, request_id)]}
            await send(message)

        token = request_context.begin(request_id.decode())
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            request_context.end(token)


def _others(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [header for header in headers if header[0].lower() != _NAME]


def middlewares() -> list[Middleware]:
    """For Ray Serve without HAProxy, which would answer with whatever id a client sends: around its own middleware."""
    return [Middleware(RequestIds)]
