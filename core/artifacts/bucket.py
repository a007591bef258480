"""Directories in an object store: files first, the manifest last."""

from __future__ import annotations

import shutil
from pathlib import Path

from core.artifacts.cache import Cache
from core.artifacts.manifest import MARKER, Manifest, directory_digest
from core.artifacts.object_store import ObjectStore
from core.errors import AdapterError


class Bucket:
    """An object store has no rename, so a directory is there when its manifest is. What an upload that was interrupted
    has left is not seen by readers, and is overwritten by the next one.
    """

    def __init__(self, store: ObjectStore, cache: Cache) -> None:
        """``cache``: local copies of what is fetched."""
        self.store = store
        self.cache = cache

    def exists(self, path: str) -> bool:
        """Whether there is a complete directory, or an object, of this name."""
        return self.store.has(f"{path}/{MARKER}") or self.store.has(path)

    def put(self, source: Path, path: str, key: str) -> None:
        """Store a directory. Raises AdapterError if the name has other contents."""
        manifest, there = Manifest.of(source), self._manifest(path, key)
        if there is not None:
            if there.digest != manifest.digest:
                raise AdapterError(f"artifact {key!r} exists with other contents.", "A name is never reused.")
            return
        for name in manifest.files or {}:
            self.store.upload(source / name, f"{path}/{name}")
        self.store.write(f"{path}/{MARKER}", manifest.dump())

    def fetch(self, path: str, key: str) -> Path:
        """A checked local copy. The copies that are there already need no object store."""
        target = self.cache.path(key)
        self.cache.hold(key)
        note = self.cache.note(key)
        if note is not None and Manifest.parse(note, key).has_all(target):
            return target
        manifest = self._manifest(path, key)
        if manifest is None:
            raise self._missing(path, key)
        with self.cache.staging(key) as staging:
            local = self._download(manifest, path, key, staging)
            if not local.has_all(target):  # nor has another process copied it meanwhile
                shutil.rmtree(target, ignore_errors=True)  # incomplete: a cleaner of temporary files was there
                _rename(staging, target, local)
        self.cache.write_note(key, local.dump())
        self.cache.evict()
        return target

    def delete(self, path: str) -> None:
        """Delete a directory, or an object. The manifest goes first: what is left after an interruption is no complete
        directory, and the next call deletes it."""
        self.store.delete(f"{path}/{MARKER}")
        for name in self.store.sizes(path):
            self.store.delete(f"{path}/{name}" if name else path)

    def _download(self, manifest: Manifest, path: str, key: str, staging: Path) -> Manifest:
        files = manifest.files
        if files is None:
            files = {name: size for name, size in self.store.sizes(path).items() if name != MARKER}
        try:
            for name, size in files.items():
                self.store.download(f"{path}/{name}", staging / name, size)
        except FileNotFoundError as error:
            raise self._damaged(key) from error
        if directory_digest(staging) != manifest.digest:
            raise self._damaged(key)
        return Manifest.of(staging)

    def _manifest(self, path: str, key: str) -> Manifest | None:
        try:
            return Manifest.parse(self.store.read(f"{path}/{MARKER}"), key)
        except FileNotFoundError:
            return None

    def _missing(self, path: str, key: str) -> AdapterError:
        if self.store.has_below(path):
            return AdapterError(
                f"the upload of artifact {key!r} was interrupted: it is incomplete.",
                "Store it again; that completes it.",
            )
        return AdapterError(f"artifact {key!r} is not in the object store.", "See `ratchet releases list`.")

    def _damaged(self, key: str) -> AdapterError:
        return AdapterError(f"artifact {key!r} arrived damaged.", "Fetch it again; check the object store.")


def _rename(staging: Path, target: Path, manifest: Manifest) -> None:
    try:
        staging.rename(target)
    except OSError:
        if not manifest.has_all(target):  # else another process was faster
            raise
