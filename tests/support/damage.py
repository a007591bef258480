"""A proxy in front of a broker that corrupts bytes on their way to the client."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from tests.support.tcp_relay import TcpRelay


class DamagingProxy(TcpRelay):
    """Replaces each marked byte sequence that the broker sends a number of times.

    A broker that is started with ``advertised`` set to this proxy's address sends its clients here.

    >>> with DamagingProxy(port, broker.address) as proxy:  # doctest: +SKIP
    ...     proxy.damage(b"the value of one record")
    """

    def __init__(self, port: int, target: str) -> None:
        super().__init__(port, target)
        self.damaged = 0
        self._left: dict[bytes, int] = {}
        self._lock = threading.Lock()

    def damage(self, mark: bytes, times: int = 1 << 30) -> None:
        """Flip the first bit of each of the next ``times`` occurrences of ``mark`` (which must not be compressed)."""
        with self._lock:
            self._left[mark] = times

    def __enter__(self) -> DamagingProxy:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        if source.getpeername()[1] != int(self.target[2]):
            return super()._relay(source, sink)
        rest = b""
        with suppress(OSError):
            while data := source.recv(1 << 16):
                ready, rest = self._changed(rest + data)
                sink.sendall(ready)
        for each in (source, sink):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        return None

    def _changed(self, data: bytes) -> tuple[bytes, bytes]:
        """Split into the bytes that can be sent on and an end that may be the beginning of a mark."""
        with self._lock:
            for mark, times in self._left.items():
                found = min(times, data.count(mark))
                data = data.replace(mark, bytes([mark[0] ^ 1]) + mark[1:], found)
                self._left[mark] -= found
                self.damaged += found
            marks = [mark for mark, times in self._left.items() if times]
        kept = max((n for mark in marks for n in range(1, len(mark)) if data.endswith(mark[:n])), default=0)
        return data[: len(data) - kept], data[len(data) - kept :]
