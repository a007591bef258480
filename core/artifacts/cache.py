"""Local copies of an object store's contents, shared by the machine's processes and bounded in bytes.

Each entry is a directory, a note next to it with the expected contents, and a lock. A process that fetches an entry
holds its lock shared; eviction takes it exclusively, and skips held entries. The kernel releases a killed process's
locks. Its leftovers have names with ``.staging-`` or ``.evicted-``, which readers ignore and the next eviction deletes.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

from core.artifacts.folder import MARKER, STAGING, file_size, remove_abandoned
from core.files import folder_next_to, replace_file

CACHE_BYTES: Final = 4 << 30
"""Bound of a cache: LoRA adapters have 5 to 200 MB each. A larger entry stays while it is held."""
HELD: Final = 16
"""Number of last fetched entries that a process keeps from being evicted. A gate has six at once."""
LOCK: Final = ".lock"
_EVICTED: Final = ".evicted-"
_held: OrderedDict[Path, int] = OrderedDict()
"""Lock descriptors of this process, for all caches: a path outlives the object that fetched it."""
_mutex = threading.Lock()


class Cache:
    """Entries by key, below a folder. Safe to use from several threads and processes."""

    def __init__(self, folder: Path, max_bytes: int = CACHE_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def path(self, key: str) -> Path:
        return self.folder / key

    def hold(self, key: str) -> None:
        """Keep an entry from being evicted until this process ends, or has fetched :data:`HELD` others."""
        path = self._lock(key)
        with _mutex:
            lock = _held.pop(path, None)
            if lock is not None and not _is_current(lock, path):
                os.close(lock)
                lock = None
            _held[path] = _acquire(path, fcntl.LOCK_SH) if lock is None else lock
            while len(_held) > HELD:
                os.close(_held.popitem(last=False)[1])

    def note(self, key: str) -> bytes | None:
        """The note of a complete entry, or None. Counts as a use."""
        try:
            data = self._note(key).read_bytes()
            os.utime(self._note(key))
        except FileNotFoundError:
            return None
        return data

    def staging(self, key: str) -> AbstractContextManager[Path]:
        return folder_next_to(self.path(key), STAGING)

    def write_note(self, key: str, data: bytes) -> None:
        replace_file(self._note(key), data, prefix=STAGING)

    def evict(self) -> int:
        """Delete the least recently used entries that are not held, until the rest fits. Returns the bytes freed; 0
        also while another process evicts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".eviction").open("a") as eviction:
            try:
                fcntl.flock(eviction, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return 0
            targets = self._targets()
            for parent in {target.parent for target in targets}:
                _remove_left_over(parent)
            entries = sorted(self._entry(target) for target in targets)
            total = sum(size for _, size, _ in entries)
            freed = 0
            for _, size, key in entries:
                if total - freed <= self.max_bytes:
                    break
                freed += size if self._remove(key) else 0
            return freed

    def _targets(self) -> set[Path]:
        """Directories of all entries, including incomplete ones of killed processes."""
        return {
            path.with_name(path.name.removesuffix(suffix)[1:])
            for suffix in (MARKER, LOCK)
            for path in self.folder.rglob(f".*{suffix}")
        }

    def _entry(self, target: Path) -> tuple[float, int, str]:
        key = target.relative_to(self.folder).as_posix()
        try:
            used = self._note(key).stat().st_mtime
        except FileNotFoundError:
            used = 0.0
        return used, sum(file_size(path) for path in target.rglob("*")), key

    def _remove(self, key: str) -> bool:
        path, target = self._lock(key), self.path(key)
        try:
            lock = _acquire(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            evicted = Path(tempfile.mkdtemp(prefix=_EVICTED, dir=target.parent))
            if target.exists():
                target.rename(evicted / "files")
            self._note(key).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        finally:
            os.close(lock)
        shutil.rmtree(evicted, ignore_errors=True)
        return True

    def _note(self, key: str) -> Path:
        target = self.path(key)
        return target.with_name(f".{target.name}{MARKER}")

    def _lock(self, key: str) -> Path:
        target = self.path(key)
        return target.with_name(f".{target.name}{LOCK}")


def _acquire(path: Path, operation: int) -> int:
    """Descriptor of a locked file, also if the file is replaced meanwhile. Raises BlockingIOError if it is held, and
    the operation does not wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, operation)
        except BaseException:
            os.close(lock)
            raise
        if _is_current(lock, path):
            return lock
        os.close(lock)


def _is_current(lock: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(lock)
    return (own.st_dev, own.st_ino) == (there.st_dev, there.st_ino)


def _remove_left_over(folder: Path) -> None:
    remove_abandoned(folder)
    for path in folder.glob(f"{_EVICTED}*"):  # one process evicts at a time: its owner is dead
        shutil.rmtree(path, ignore_errors=True)
