"""Web servers on loopback with scripted answers, byte for byte."""

from __future__ import annotations

import contextlib
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from socket import socket
from typing import Any

Answer = bytes | Callable[[socket], None]
WAIT_SECONDS = 10.0


def reply(body: bytes = b"", status: str = "200 OK", **headers: str | None) -> bytes:
    """A whole answer. ``content_length=None`` omits that header."""
    shown: dict[str, str | None] = {"content-length": str(len(body)), "content-type": "image/png"}
    shown |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in shown.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def redirect(to: str, status: str = "302 Found") -> bytes:
    return reply(status=status, location=to)


@dataclass
class WebServer:
    """A server at ``host``; ``pages`` by path. ``asked`` has the whole heads of the requests."""

    host: str
    port: int
    pages: dict[str, Answer] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)
    """A client closed its connection while an endless answer was being sent."""

    def endless(self, chunk: bytes, pause: float = 0.0, head: bytes = b"") -> Callable[[socket], None]:
        begin = head or reply(content_length=None)

        def send(wire: socket) -> None:
            tick = threading.Event()
            try:
                wire.sendall(begin)
                while True:
                    wire.sendall(chunk)
                    tick.wait(pause)
            except OSError:
                self.hung_up.set()

        return send


@contextlib.contextmanager
def web_server(host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None) -> Iterator[WebServer]:
    """Run a server with a thread per connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            wire: Any = self.request
            wire.settimeout(WAIT_SECONDS)
            with contextlib.suppress(OSError):  # clients of these tests hang up as they like
                if tls is not None:
                    wire = tls.wrap_socket(wire, server_side=True)
                head = b""
                while b"\r\n\r\n" not in head and (more := wire.recv(4096)):
                    head += more
                made.asked.append(head.decode())
                path = head.decode().split(" ")[1].partition("?")[0]
                answer = made.pages.get(path, reply(b"none", "404 Not Found"))
                wire.sendall(answer) if isinstance(answer, bytes) else answer(wire)
            wire.close()

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = True
        daemon_threads = True
        request_queue_size = 128  # more connections at once than that wait a second to try again

    with Server((host, port), Handler) as server:
        made = WebServer(host, server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()
