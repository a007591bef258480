"""A record that kills the process: it is known after the third death, and refused.

While a record is validated, by a thread of the consumer or in a process of its own, a file says which one. The file is
mapped into memory, so that its content survives the process (not the machine). Whoever notices the death counts it for
each record that the file names: the consumer, when a process that validates for it has died; the next consumer, when
the consumer itself has. A record with a death is validated alone from then on, so that no other one is blamed for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Final

from core.errors import StoreFull, StoreUnavailable
from core.files import replace_file
from streams.store.rows import RecordPosition, name_of

DEATHS: Final = 3
SLOT_BYTES: Final = 512
"""A topic name has at most 249 characters."""


class Notes:
    """Slots of a mapped file that say what is being validated. Thread safe."""

    def __init__(self, content: mmap.mmap, slots: Iterable[int]) -> None:
        self._content = content
        self._lock = threading.Lock()
        self._free = list(slots)
        self._closed = False

    @classmethod
    def of_process(cls, path: Path, number: int, threads: int) -> Notes:
        """In a process that validates: its slots in the file of its consumer, which has some for each ``number``."""
        file = os.open(path, os.O_RDWR)
        try:
            content = mmap.mmap(file, 0)
        finally:
            os.close(file)
        return cls(content, range(number * threads, (number + 1) * threads))

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

    def take(self) -> list[str]:
        """The records that all slots of the file name, which are empty from then on."""
        with self._lock:
            named = _named(self._content[:])
            self._content[:] = bytes(len(self._content))
        return named

    def close(self) -> None:
        """Empty the slots: what is still being validated is given up by a stop, and did not kill anything."""
        with self._lock:
            self._closed = True
            self._content[:] = bytes(len(self._content))
            self._content.close()

    def _write(self, slot: int, text: bytes) -> None:
        with self._lock:
            if not self._closed:
                self._content[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = text[:SLOT_BYTES].ljust(SLOT_BYTES, b"\0")


class CrashGuard:
    """Knows what was being validated when a process died. Thread safe."""

    def __init__(self, folder: Path, slots: int) -> None:
        """
        Args:
            folder: of this installation's consumers on this machine, who take over from each other.
            slots: most records that are validated at once.

        Raises:
            StoreUnavailable: the folder cannot be written.
        """
        self._counts_file = folder / "crashes.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, self.path = _lock_file(folder)
        except OSError as error:
            raise _outage(folder, error) from error
        try:
            content, self._counts = self._take_over(slots)
        except OSError as error:
            os.close(self._file)
            raise _outage(folder, error) from error
        self._notes = Notes(content, range(slots))

    def _take_over(self, slots: int) -> tuple[mmap.mmap, Counter[str]]:
        """Count the deaths of the dead process that held the file, and begin with an empty one."""
        counts = Counter(_load(self._counts_file))
        left = _named(os.pread(self._file, os.fstat(self._file).st_size, 0))
        counts.update(left)
        if left:
            _save(self._counts_file, counts)
        os.ftruncate(self._file, 0)
        os.posix_fallocate(self._file, 0, slots * SLOT_BYTES)  # or writing to it on a full disk is a SIGBUS
        return mmap.mmap(self._file, slots * SLOT_BYTES), counts

    def deaths(self, position: RecordPosition) -> int:
        """How often a process died while it validated this record."""
        return self._counts[name_of(position)]

    def is_poison(self, position: RecordPosition) -> bool:
        """Whether it is to be refused instead."""
        return self.deaths(position) >= DEATHS

    def validating(self, position: RecordPosition) -> AbstractContextManager[None]:
        """What is done inside, on a thread of this process, is done to this record."""
        return self._notes.validating(position)

    def count_deaths(self) -> None:
        """Count a death for all that was being validated by processes of this consumer, which are all dead."""
        self._count(self._notes.take())

    def died(self, position: RecordPosition) -> None:
        """A process died that had this record alone, but not the time to note it."""
        self._count([name_of(position)])

    def forget(self, positions: Iterable[RecordPosition]) -> None:
        """These records are stored, and are not validated again."""
        if self._counts:
            known = [key for key in map(name_of, positions) if key in self._counts]
            for key in known:
                del self._counts[key]
            if known:
                self._remember()

    def close(self) -> None:
        """Let the file go."""
        self._notes.close()
        os.close(self._file)

    def _count(self, names: Sequence[str]) -> None:
        if names:
            self._counts.update(names)
            self._remember()

    def _remember(self) -> None:
        with suppress(OSError):  # a full disk: it is remembered with the next one
            _save(self._counts_file, self._counts)


def _lock_file(folder: Path) -> tuple[int, Path]:
    """A file that no living consumer holds."""
    number = 0
    while True:
        path = folder / f"validating-{number}"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, path
        except BlockingIOError:
            os.close(file)
            number += 1


def _named(content: bytes) -> list[str]:
    """The records that slots name."""
    slots = (content[start : start + SLOT_BYTES] for start in range(0, len(content), SLOT_BYTES))
    return [text for slot in slots if (text := slot.rstrip(b"\0").decode(errors="replace"))]


def _save(path: Path, counts: Counter[str]) -> None:
    replace_file(path, json.dumps(counts).encode())


def _outage(folder: Path, error: OSError) -> StoreUnavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoreFull(f"the disk of the folder {folder} is full.", "Free space; nothing is lost.")
    return StoreUnavailable(f"the folder {folder} cannot be written: {error}.", "Check `home`.")


def _load(path: Path) -> dict[str, int]:
    try:
        return {str(key): int(count) for key, count in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        return {}
