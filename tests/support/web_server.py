"""Web servers on loopback with scripted answers, byte for byte."""

from __future__ import annotations

import contextlib
import re
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
def web_server(
    host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None,
    answer: Callable[[str, bytes], bytes] | None = None,
) -> Iterator[WebServer]:  # fmt: skip
    """Run a server with a thread per connection. ``answer``: of heads and bodies, instead of pages."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            wire: Any = self.request
            wire.settimeout(WAIT_SECONDS)
            with contextlib.suppress(OSError):  # clients of these tests hang up as they like
                if tls is not None:
                    wire = tls.wrap_socket(wire, server_side=True)
                received = b""
                while b"\r\n\r\n" not in received and (more := wire.recv(4096)):
                    received += more
                head, _, body = received.partition(b"\r\n\r\n")
                path = head.decode().split(" ")[1].partition("?")[0]
                page = made.pages.get(path, reply(b"none", "404 Not Found"))
                if answer is None:
                    made.asked.append(received.decode())
                else:
                    size = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                    while size and len(body) < int(size[1]):
                        body += wire.recv(4096)
                    page = answer(head.decode(), body)
                wire.sendall(page) if isinstance(page, bytes) else page(wire)
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
