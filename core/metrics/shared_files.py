"""The files through which the processes of a machine share their metrics, on a disk that may be full.

prometheus_client maps sparse files into memory. Writing to one where the disk has no block left ends the process
(SIGBUS), whatever else it does. So blocks are allocated here before they are mapped, and what finds no room is kept in
memory until there is some.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any, Final

from prometheus_client import mmap_dict, values

log = logging.getLogger("ratchet.metrics")
INITIAL_BYTES: Final = 1 << 16
"""What prometheus_client begins with; it doubles from there."""
RETRY_SECONDS: Final = 10.0
"""How often room is asked for again."""


class AllocatedDict(mmap_dict.MmapedDict):
    """A dictionary of doubles in a file. Values for which the disk has no room are not exported until it has."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        self._path = Path(filename)
        self._read_mode = read_mode
        self._waiting: dict[str, tuple[float, float]] = {}
        self._retry_at = 0.0
        self._f: Any = None
        self._positions: dict[str, int] = {}
        self._has_file()

    def read_value(self, key: str) -> tuple[float, float]:
        """Value and timestamp; a new key is 0."""
        if self._has_room(key):
            value: tuple[float, float] = super().read_value(key)  # type: ignore[no-untyped-call]
            return value
        return self._waiting.setdefault(key, (0.0, 0.0))

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        """Set value and timestamp."""
        if self._has_room(key):
            self._waiting.pop(key, None)
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]
        else:
            self._waiting[key] = (value, timestamp)

    def _has_room(self, key: str) -> bool:
        if not self._has_file():
            return False
        if key in self._positions:
            return True
        capacity = self._capacity
        # As in _init_value: a length of 4 bytes, the key padded to 8 bytes, two doubles.
        length = len(key.encode())
        end = self._used + 4 + length + (8 - (length + 4) % 8) + 16
        while end > capacity:
            capacity *= 2
        return capacity == self._capacity or self._allocate(self._f.fileno(), capacity)

    def _has_file(self) -> bool:
        if self._f is not None:
            return True
        if time.monotonic() < self._retry_at:
            return False
        try:
            with self._path.open("rb" if self._read_mode else "a+b") as file:
                size = os.fstat(file.fileno()).st_size
                if not self._read_mode and not self._allocate(file.fileno(), max(size, INITIAL_BYTES)):
                    if size == 0:
                        self._path.unlink()  # readers cannot read an empty one
                    return False
            super().__init__(str(self._path), self._read_mode)  # type: ignore[no-untyped-call]
        except OSError as error:
            self._postpone(error)
            return False
        return True

    def _allocate(self, descriptor: int, size: int) -> bool:
        if time.monotonic() < self._retry_at:
            return False
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            self._postpone(error)
            return False
        self._retry_at = 0.0
        return True

    def _postpone(self, error: OSError) -> None:
        if self._retry_at == 0.0:
            log.warning("some metrics of this process are not exported: %s: %s", self._path, error.strerror)
        self._retry_at = time.monotonic() + RETRY_SECONDS


def install() -> None:
    """Let prometheus_client use these files from now on. Without ``posix_fallocate`` (macOS) nothing changes."""
    if hasattr(os, "posix_fallocate"):
        values.MmapedDict = AllocatedDict  # type: ignore[attr-defined]
