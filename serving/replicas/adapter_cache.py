"""Adapters on this node, so that a replica can start while the artifacts are away."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, Protocol

from core.artifacts import Artifacts, directory_digest
from core.artifacts.folder import STAGING, remove_abandoned
from core.errors import AdapterError, LedgerUnavailable, RatchetError, StoreUnavailable
from core.files import folder_next_to
from core.ledger import Ledger
from serving.own_threads import BoundedCall

log = logging.getLogger("ratchet.adapters")
FETCH_SECONDS: Final = 20.0
RETRY_SECONDS: Final = 5.0
"""After a failed fetch, further fetches of the adapter fail at once for this long, so that no requests queue up."""
MAX_BYTES: Final = 4 << 30
"""Of the cache. A LoRA adapter of a CLIP has about 5 MB, of a VLM up to 200 MB: room for twenty of the largest."""
DIGEST: Final = ".sha256"


def adapters_path(home: Path) -> Path:
    return home / "serving" / "adapters"


class AdapterFolders(Protocol):
    """See :meth:`AdapterCache.fetch`; implemented by :class:`core.artifacts.Artifacts`, too."""

    def fetch(self, key: str) -> Path:
        """A local directory with the content of a key."""


class AdapterCache:
    """A folder with copies of adapters and their full digests, shared by the processes of a node. Adapters never
    change, so a copy with the right digest is used without the artifacts. Thread-safe."""

    def __init__(
        self, artifacts: Artifacts, folder: Path, ledger: Ledger | None = None, max_bytes: int = MAX_BYTES
    ) -> None:
        """``ledger``: has the recorded digests of adapters; without it, or while it is away, only the artifacts'
        manifest is checked."""
        self.artifacts = artifacts
        self._ledger = ledger
        self.folder = folder
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._fetches: dict[str, BoundedCall[Path]] = {}
        self._failed: dict[str, tuple[float, RatchetError]] = {}
        self._protected: frozenset[str] = frozenset()
        self._expected: dict[str, str] = {}

    def expect(self, digests: Mapping[str, str]) -> None:
        """Accept only files with these full digests for these adapters."""
        self._expected |= digests

    def protect(self, names: Collection[str | None]) -> None:
        """Do not remove these adapters to make room."""
        self._protected = frozenset(name for name in names if name is not None)

    def digests(self) -> dict[str, str]:
        """Full digests of the cached adapters by name."""
        files = self.folder.glob(f"*{DIGEST}") if self.folder.is_dir() else ()
        return {file.name.removesuffix(DIGEST): file.read_text().strip() for file in files}

    def fetch(self, key: str) -> Path:
        """A local directory with the adapter ``adapters/<name>``. Raises AdapterError when the artifacts lack it or
        have it damaged; StoreUnavailable when it is not cached and the artifacts are away."""
        name = key.rpartition("/")[2]
        if (copy := self._copy(name)) is not None:
            return copy
        with self._lock:
            until, error = self._failed.get(name, (0.0, None))
            if error is not None and time.monotonic() < until:
                raise error
            fetch = self._fetches.setdefault(name, BoundedCall(lambda: self._download(key, name), FETCH_SECONDS))
        try:
            path = fetch()
        except RatchetError as failure:
            raise self._remember(name, failure) from None
        except Exception as failure:
            unavailable = StoreUnavailable(
                f"{name} cannot be fetched from the artifacts: {type(failure).__name__}: {str(failure)[:200]}.",
                "Bring the artifacts back.",
            )
            raise self._remember(name, unavailable) from None
        with self._lock:
            self._fetches.pop(name, None)
            self._failed.pop(name, None)
        return path

    def _remember(self, name: str, error: RatchetError) -> RatchetError:
        with self._lock:
            self._failed[name] = (time.monotonic() + RETRY_SECONDS, error)
        return error

    def _copy(self, name: str) -> Path | None:
        target, note = self.folder / name, self.folder / f"{name}{DIGEST}"
        try:
            written = note.read_text().strip()
            if directory_digest(target) == written == self._expected.get(name, written):
                os.utime(note)
                return target
        except OSError:
            return None
        log.warning("the copy of %s in %s is damaged: fetching it again", name, self.folder)
        note.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        return None

    def _download(self, key: str, name: str) -> Path:
        source = self.artifacts.fetch(key)
        digest = directory_digest(source)
        if digest != (self._expected.get(name) or self._recorded(name) or digest):
            raise AdapterError(f"{name} has other contents in the artifacts than when it was recorded.")
        target = self.folder / name
        try:
            self._store(source, target, digest)
        except OSError as error:  # such as a full disk: use the artifacts' own copy
            log.warning("%s cannot be kept in %s: %s", name, self.folder, error)
            return source
        self._make_room(name)
        return target

    def _recorded(self, name: str) -> str | None:
        if self._ledger is None:
            return None
        try:
            return self._ledger.adapter_digests([name]).get(name)
        except LedgerUnavailable as error:
            log.warning("the digest of %s is not compared with the ledger's: %s", name, error)
            return None

    def _store(self, source: Path, target: Path, digest: str) -> None:
        with folder_next_to(target, STAGING) as staging:
            shutil.copytree(source, staging / "files")
            (staging / "digest").write_text(digest)
            try:
                (staging / "files").rename(target)
            except OSError:  # another process was first
                if not target.is_dir():
                    raise
            (staging / "digest").replace(target.with_name(f"{target.name}{DIGEST}"))

    def _make_room(self, newest: str) -> None:
        """Remove leftovers of killed processes, then the least recently used adapters until the rest fits."""
        remove_abandoned(self.folder)
        notes = sorted(self.folder.glob(f"*{DIGEST}"), key=lambda note: note.stat().st_mtime)
        names = [note.name.removesuffix(DIGEST) for note in notes]
        sizes = {name: sum(p.stat().st_size for p in (self.folder / name).rglob("*") if p.is_file()) for name in names}
        total = sum(sizes.values())
        for name in names:
            if total <= self.max_bytes:
                return
            if name != newest and name not in self._protected:
                (self.folder / f"{name}{DIGEST}").unlink(missing_ok=True)
                shutil.rmtree(self.folder / name, ignore_errors=True)
                total -= sizes[name]
