"""A TCP relay that makes a service slow, or unreachable for a while without losing its contents."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress


class TcpRelay:
    def __init__(self, port: int, target: str) -> None:
        """``port``: of 127.0.0.1 to listen on. ``target``: host:port to forward to."""
        self.port = port
        self.target = target.rpartition(":")
        self.delay_seconds = 0.0
        """Delay of each piece of data, in both directions."""
        self._listener: socket.socket | None = None
        self._links: list[socket.socket] = []
        self._lock = threading.Lock()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        with self._lock:
            sockets = [*self._links, *([self._listener] if self._listener else [])]
            self._links, self._listener = [], None
        for each in sockets:
            break_link(each)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection((self.target[0], int(self.target[2])))
                except OSError:
                    near.close()
                    continue
                with self._lock:
                    current = self._listener is listener
                    self._links += [near, far] if current else []
                if not current:  # cut meanwhile
                    break_link(near)
                    break_link(far)
                    return
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self.delay_seconds:
                    time.sleep(self.delay_seconds)
                sink.sendall(data)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def break_link(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
    link.close()
