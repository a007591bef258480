"""A record that kills the process: it is known after the third death, and refused.

While a thread validates a record, a file says which one. The file is mapped into memory, so that its content survives
the process (not the machine). The next process counts a death for each record that it finds there. A record with a
death is validated alone from then on, so that no other one is blamed for it.
"""

from __future__ import annotations

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

from ops.errors import StoreUnavailable
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, left = _lock_file(folder, threads)
            self._slots = mmap.mmap(self._file, threads * SLOT_BYTES)
            self._counts = Counter(_load(self._counts_file))
            self._counts.update(left)
            if left:
                self._save()
        except OSError as error:
            raise StoreUnavailable(f"the folder {folder} cannot be written: {error}.", "Check `home`.") from error

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
        start = slot * SLOT_BYTES
        text = name_of(position).encode()[:SLOT_BYTES]
        self._slots[start : start + len(text)] = text
        try:
            yield
        finally:
            self._slots[start : start + len(text)] = bytes(len(text))
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
                    self._save()

    def close(self) -> None:
        """Let the file go: nothing was being validated."""
        self._slots.close()
        os.close(self._file)

    def _save(self) -> None:
        partial = self._counts_file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(self._counts))
        partial.replace(self._counts_file)


def _lock_file(folder: Path, threads: int) -> tuple[int, list[str]]:
    """A file that no living process holds, and what it says of the dead one that held it."""
    number = 0
    while True:
        file = os.open(folder / f"validating-{number}", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            number += 1
            continue
        content = os.pread(file, os.fstat(file).st_size, 0)
        slots = (content[start : start + SLOT_BYTES] for start in range(0, len(content), SLOT_BYTES))
        left = [text for slot in slots if (text := slot.rstrip(b"\0").decode(errors="replace"))]
        os.ftruncate(file, 0)
        os.ftruncate(file, threads * SLOT_BYTES)
        return file, left


def _load(path: Path) -> dict[str, int]:
    try:
        return {str(key): int(count) for key, count in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}
