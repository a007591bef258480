"""The middlewares of the server around an application that answers with the size of the body."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.settings.serving import Serve
from serving.http.request_bodies import RequestBodies, RequestLimits


class EchoApp:
    """Answers at once or, with ``waits``, when ``go`` is set."""

    def __init__(self, waits: bool = False) -> None:
        self.waits = waits
        self.go = asyncio.Event()
        self.clients: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.clients.append(scope["client"][0])
        size = 0
        while True:
            message = await receive()
            size += len(message.get("body", b""))
            if not message.get("more_body"):
                break
        if self.waits:
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


class RawRequest:
    """One request at the ASGI level, whose client sends its body in pieces, or never."""

    def __init__(self, app: ASGIApp, path: str = "/v1/embeddings", peer: str = "127.0.0.1", length: int = 100) -> None:
        headers = [(b"host", b"localhost"), (b"content-length", str(length).encode())]
        self.scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": headers, "client": (peer, 1), "server": ("localhost", 80), "scheme": "http",
            "http_version": "1.1", "root_path": "", "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        self.messages: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.task = asyncio.create_task(self._run(app))

    async def _run(self, app: ASGIApp) -> None:
        await app(self.scope, self.messages.get, self._send)

    async def _send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append(message)

    def send_body(self, data: bytes, more: bool = True) -> None:
        self.messages.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def hang_up(self) -> None:
        self.messages.put_nowait({"type": "http.disconnect"})

    async def status(self) -> int:
        await self.task
        return int(self.sent[0]["status"])

    def body(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()
