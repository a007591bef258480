"""Memory of all processes of a server over time."""

from __future__ import annotations

import math
import os
import threading
import time
from pathlib import Path

from core.settings import Settings
from serving.ray.ray_session import session_directory

PAGE = os.sysconf("SC_PAGE_SIZE")


class ServerMemory:
    """Samples resident memory twice a second; shared pages count once for each process. Linux only, 0 elsewhere.

    >>> with ServerMemory(settings) as memory:
    ...     ...
    >>> memory.most_bytes()
    """

    def __init__(self, settings: Settings, seconds: float = 0.5) -> None:
        self._samples: list[tuple[float, int]] = []
        self._mark = str(session_directory(settings)).encode()
        self._seconds = seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> ServerMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def most_bytes(self, began: float = 0.0, ended: float = math.inf) -> int:
        """The highest sum over all processes between two times; seconds since the epoch."""
        return max((size for at, size in self._samples if began <= at <= ended), default=0)

    def _watch(self) -> None:
        while True:
            self._samples.append((time.time(), sum(_resident(process) for process in self._processes())))
            if self._done.wait(self._seconds):
                return

    def _processes(self) -> list[Path]:
        ours = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes()
                if self._mark in command or (command.startswith(b"ray::") and self._mark in _environ(process)):
                    ours.append(process)
            except OSError:
                continue
        return ours


def _environ(process: Path) -> bytes:
    return (process / "environ").read_bytes()


def _resident(process: Path) -> int:
    try:
        return int((process / "statm").read_text().split()[1]) * PAGE
    except OSError:
        return 0
