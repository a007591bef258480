"""A TCP relay in front of PostgreSQL that loses the next COMMIT, or the answer to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

Loss = Literal["request", "answer", "connection"]
"""``request``: the server never sees COMMIT. ``answer``: it carries it out, and the client never hears of it.
``connection``: the client loses the connection first, and COMMIT reaches the server after that."""


class CommitRelay:
    """Listens on a free port and passes everything on, except for what :meth:`lose` names."""

    def __init__(self, port: int) -> None:
        """``port``: of 127.0.0.1, where PostgreSQL listens."""
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._armed: tuple[Loss, Callable[[], None]] | None = None
        self.lost = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, loss: Loss, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Lose the next COMMIT in this way. ``meanwhile`` runs before the client notices (``request``, ``answer``), or
        before the server gets it (``connection``).
        """
        self._armed = (loss, meanwhile)

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                answered = threading.Event()
                muted = threading.Event()
                threading.Thread(target=self._requests, args=(near, far, answered, muted), daemon=True).start()
                threading.Thread(target=_answers, args=(near, far, answered, muted), daemon=True).start()

    def _requests(
        self, near: socket.socket, far: socket.socket, answered: threading.Event, muted: threading.Event
    ) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                if self._armed is None or b"COMMIT" not in data:
                    far.sendall(data)
                    continue
                (loss, meanwhile), self._armed = self._armed, None
                self.lost += 1
                muted.set()
                if loss == "connection":
                    _break(near)
                if loss == "answer":
                    far.sendall(data)
                    answered.wait()
                meanwhile()
                if loss == "connection":
                    far.sendall(data)
                    answered.wait()
                break
        _break(near)
        _break(far)


def _answers(near: socket.socket, far: socket.socket, answered: threading.Event, muted: threading.Event) -> None:
    with suppress(OSError):
        while data := far.recv(1 << 16):
            if muted.is_set():
                answered.set()
            else:
                near.sendall(data)
    answered.set()
    if not muted.is_set():
        _break(near)


def _break(link: socket.socket) -> None:
    with suppress(OSError):
        link.shutdown(socket.SHUT_RDWR)
    link.close()
