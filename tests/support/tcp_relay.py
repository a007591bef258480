"""A TCP relay that makes a service slow, or unreachable for a while without losing its contents."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Self


class TcpRelay:
    """A context manager, or opened and cut by hand."""

    def __init__(self, port: int, target: str) -> None:
        """``port``: of 127.0.0.1 to listen on. ``target``: host:port to forward to."""
        self.port = port
        host, _, number = target.rpartition(":")
        self.target = (host, int(number))
        self.delay_seconds = 0.0
        """Delay of each piece of data, in both directions."""
        self._listener: socket.socket | None = None
        self._links: list[socket.socket] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        _in_thread(self._accept, self._listener)

    def cut(self) -> None:
        with self._lock:
            sockets = [*self._links, *([self._listener] if self._listener else [])]
            self._links, self._listener = [], None
        for each in sockets:
            break_link(each)

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                _in_thread(self._connect, listener, listener.accept()[0])

    def _connect(self, listener: socket.socket, near: socket.socket) -> None:
        """In a thread per connection: a stopped server accepts no more connections, and TCP tries for a minute."""
        try:
            far = socket.create_connection(self.target)
        except OSError:
            near.close()
            return
        with self._lock:
            current = self._listener is listener
            self._links += [near, far] if current else []
        if current:
            _in_thread(self._relay, near, far)
            _in_thread(self._relay, far, near)
        else:  # cut meanwhile
            break_link(near)
            break_link(far)

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                sink.sendall(data)
        end_link(source, sink)


def _in_thread(function: object, *arguments: object) -> None:
    threading.Thread(target=function, args=arguments, daemon=True).start()  # type: ignore[arg-type]


def end_link(*links: socket.socket) -> None:
    for each in links:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def break_link(link: socket.socket) -> None:
    end_link(link)
    link.close()
