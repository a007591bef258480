"""A lock that many readers share, and a writer has alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class ReadWriteLock:
    """A writer that waits goes before readers that come later."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._readers = 0
        self._writers = 0
        self._writing = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Beside other readers."""
        with self._free:
            self._free.wait_for(lambda: not self._writers)
            self._readers += 1
        try:
            yield
        finally:
            with self._free:
                self._readers -= 1
                if not self._readers and self._writers:
                    self._free.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Alone."""
        with self._free:
            self._writers += 1
            self._free.wait_for(lambda: not self._readers and not self._writing)
            self._writing = True
        try:
            yield
        finally:
            with self._free:
                self._writers -= 1
                self._writing = False
                self._free.notify_all()
