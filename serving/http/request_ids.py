"""Gives each request an ID, the client's or a new one, which every answer has in ``x-request-id``. Pure ASGI,
outermost. HAProxy, where it is in front, has set it by then (:mod:`serving.ray.haproxy`)."""

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
"""Of UUIDs, ULIDs, base64 and IDs of the usual proxies; nothing that logs or pages must escape."""
_ID = re.compile(rf"[{ALPHABET}]{{1,{MAX_CHARS}}}".encode())
_NAME = HEADER.encode()


class RequestIds:
    """Replaces IDs that are too long or have other characters."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = next((value for name, value in scope["headers"] if name == _NAME), b"")
        if _ID.fullmatch(request_id) is None:
            request_id = uuid.uuid4().hex.encode()
            scope["headers"] = [*_others(scope["headers"]), (_NAME, request_id)]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                # A copy, because the application may send its message again.
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
    """For Ray Serve without HAProxy, around its own middleware, which would accept any ID of a client."""
    return [Middleware(RequestIds)]
