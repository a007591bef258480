"""A server with scripted answers, and both clients behind one interface to call it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ratchet_client import AsyncClient, Client


@dataclass
class ScriptedServer:
    """Gives the answers in order, then repeats the last one. ``None`` drops the connection."""

    url: str = ""
    answers: list[tuple[int, dict[str, str], bytes] | None] = field(default_factory=list)
    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    """Method, path and body of each request."""

    def answer(self, status: int = 200, body: Any = None, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers.append((status, named, body if isinstance(body, bytes) else json.dumps(body).encode()))

    def fail(self, status: int, code: str, message: str = "no.", **headers: str) -> None:
        self.answer(status, {"error": {"message": message, "code": code, "type": "x", "param": None}}, **headers)


@contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            size = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(size)) if size else None
            server.asked.append((self.command, self.path, body))
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            if answer is None:
                self.close_connection = True
                return
            status, headers, content = answer
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join(60)
        http.server_close()


def call(kind: str, url: str, method: str, *args: Any, options: dict[str, Any] | None = None, **named: Any) -> Any:
    """Call a method of the ``sync`` or the ``async`` client."""
    if kind == "sync":
        with Client(url, **(options or {})) as client:
            return getattr(client, method)(*args, **named)

    async def run() -> Any:
        async with AsyncClient(url, **(options or {})) as client:
            return await getattr(client, method)(*args, **named)

    return asyncio.run(run())
