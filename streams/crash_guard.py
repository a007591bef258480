"""A record that kills the process: it is known after the third death, and refused.

While a thread validates a record, a file says which one. The file is mapped into memory, so that its content survives
the process (not the machine). The next process counts a death for each record that it finds there. A record with a
death is validated alone from then on, so that no other one is blamed for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from ops.errors import StoreFull, StoreUnavailable
from streams.rows import RecordPosition, name_of

DEATHS: Final = 3
SLOT_BYTES: Final = 512
"""A topic name has at most 249 characters."""


class CrashGuard:
    """Knows what was being validated when a process died. Thread safe."""

    def __init__(self, folder: Path, threads: int) -> None:
        """``folder``: of this installation's workers on this machine, who take over from each other.

        Raises:
            StoreUnavailable: the folder cannot be written.
        """
        self._counts_file = folder / "crashes.json"
        self._lock = threading.Lock()
        self._free = list(range(threads))
        self._closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = _lock_file(folder)
        except OSError as error:
            raise _outage(folder, error) from error
        try:
            self._slots, self._counts = self._take_over(threads)
        except OSError as error:
            os.close(self._file)
            raise _outage(folder, error) from error

    def _take_over(self, threads: int) -> tuple[mmap.mmap, Counter[str]]:
        """Count the deaths of the dead process that held the file, and begin with an empty one."""
        counts = Counter(_load(self._counts_file))
        left = _left_in(self._file)
        counts.update(left)
        if left:
            _save(self._counts_file, counts)
        os.ftruncate(self._file, 0)
        os.posix_fallocate(self._file, 0, threads * SLOT_BYTES)  # or writing to it on a full disk is a SIGBUS
        return mmap.mmap(self._file, threads * SLOT_BYTES), counts

    def deaths(self, position: RecordPosition) -> int:
        """How often a process died while it validated this record."""
        return self._counts[name_of(position)]

    def is_poison(self, position: RecordPosition) -> bool:
        """Whether it is to be refused instead."""
        return self.deaths(position) >= DEATHS

    @contextmanager
    def validating(self, position: RecordPosition) -> Iterator[None]:
        """What is done inside is done to this record."""
        with self._lock:
            slot = self._free.pop()
        self._write(slot, name_of(position).encode())
        try:
            yield
        finally:
            self._write(slot, b"")
            with self._lock:
                self._free.append(slot)

    def forget(self, positions: Iterable[RecordPosition]) -> None:
        """These records are stored, and are not validated again."""
        if self._counts:
            known = [key for key in map(name_of, positions) if key in self._counts]
            for key in known:
                del self._counts[key]
            if known:
                with suppress(OSError):  # a full disk: it is forgotten with the next one
                    _save(self._counts_file, self._counts)

    def close(self) -> None:
        """Let the file go. What a thread is still validating did not kill the process: it is given up by a stop."""
        with self._lock:
            self._closed = True
            self._slots[:] = bytes(len(self._slots))
            self._slots.close()
        os.close(self._file)

    def _write(self, slot: int, text: bytes) -> None:
        with self._lock:
            if not self._closed:
                self._slots[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = text[:SLOT_BYTES].ljust(SLOT_BYTES, b"\0")


def _lock_file(folder: Path) -> int:
    """A file that no living process holds."""
    number = 0
    while True:
        file = os.open(folder / f"validating-{number}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            os.close(file)
            number += 1


def _left_in(file: int) -> list[str]:
    """What the file says of the dead process that held it."""
    content = os.pread(file, os.fstat(file).st_size, 0)
    slots = (content[start : start + SLOT_BYTES] for start in range(0, len(content), SLOT_BYTES))
    return [text for slot in slots if (text := slot.rstrip(b"\0").decode(errors="replace"))]


def _save(path: Path, counts: Counter[str]) -> None:
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(counts))
    partial.replace(path)


def _outage(folder: Path, error: OSError) -> StoreUnavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"the disk of the folder {folder} is full.", "Free space; nothing is lost.")
    return StoreUnavailable(f"the folder {folder} cannot be written: {error}.", "Check `home`.")


def _load(path: Path) -> dict[str, int]:
    try:
        return {str(key): int(count) for key, count in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}
