"""Artifacts (adapters, bases, gate reports) behind one URL: a folder, or any object store that fsspec knows."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from core.artifacts import folder
from core.artifacts.cache import CACHE_BYTES, Cache
from core.artifacts.folder import directory_digest
from core.artifacts.object_store import CALL_SECONDS, Bucket, ObjectStore, local_folder, open_filesystem
from core.digests import digest12
from core.errors import AdapterError
from core.files import replace_file

__all__ = ["Artifacts", "directory_digest"]


class Artifacts:
    """Stores immutable directories and objects by keys like ``adapters/clip-0123456789ab``. With an object store
    methods raise ArtifactsUnavailable if it does not answer in time."""

    def __init__(
        self, url: str, cache: Path | None = None, seconds: float = CALL_SECONDS, cache_bytes: int = CACHE_BYTES
    ) -> None:
        """Open the artifacts of a folder, or of a URL that fsspec knows. ``cache``: folder for local copies of an
        object store's contents, bounded by ``cache_bytes``; the least recently used are evicted. ``seconds``: time
        limit of an object store call; transfers get more by their size."""
        self.filesystem, self.root = open_filesystem(url)
        self.local = local_folder(self.filesystem, self.root)
        default_cache = Path(tempfile.gettempdir()) / f"ratchet-artifacts-{os.getuid()}"
        self.cache = (cache or default_cache) / digest12(url.encode())
        self._store = ObjectStore(self.filesystem, seconds)
        self._bucket = Bucket(self._store, Cache(self.cache, cache_bytes))

    def _path(self, key: str) -> str:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise AdapterError(f"artifact key {key!r} leaves the artifact folder.", "Use a relative key.")
        return f"{self.root}/{key}"

    def exists(self, key: str) -> bool:
        path = self._path(key)
        return Path(path).exists() if self.local is not None else self._bucket.exists(path)

    def put_directory(self, source: Path, key: str) -> None:
        """Store a directory atomically; repeatable after a failure or a crash. Raises AdapterError if the key has other
        contents already."""
        path = self._path(key)
        if self.local is not None:
            folder.put_directory(source, Path(path), key)
        else:
            self._bucket.put(source, path, key)

    def fetch(self, key: str, digest: str | None = None) -> Path:
        """A local directory with the contents of ``key``: the original, or a cached, verified copy. ``digest``: the
        expected :func:`directory_digest`, from the ledger (:attr:`AdapterRow.digest`). Raises AdapterError if it is
        missing, incomplete, damaged, or does not match ``digest``."""
        path = self._path(key)
        if self.local is None:
            directory = self._bucket.fetch(path, key)
        elif Path(path).exists():
            directory = Path(path)
        else:
            raise AdapterError(f"artifact {key!r} is not in {self.root}.", "See `ratchet releases list`.")
        if digest is not None and directory_digest(directory) != digest:
            raise AdapterError(
                f"artifact {key!r} is not the one in the ledger: its files have another SHA-256.",
                "Restore it from a backup, or roll back to another release.",
            )
        return directory

    def delete(self, key: str) -> None:
        """Delete a directory or an object; a missing one is ignored. Readers see all of it or nothing; repeatable after
        an interruption."""
        path = self._path(key)
        if self.local is not None:
            folder.delete(Path(path))
        else:
            self._bucket.delete(path)

    def sizes(self, key: str) -> dict[str, int]:
        """Total bytes by name directly below a key, complete or not."""
        path = self._path(key)
        if self.local is not None:
            return folder.sizes(Path(path))
        total: dict[str, int] = {}
        for name, size in self._store.sizes(path).items():
            first = name.partition("/")[0]
            total[first] = total.get(first, 0) + size
        return total

    def write_bytes(self, key: str, data: bytes) -> None:
        path = self._path(key)
        if self.local is not None:
            replace_file(Path(path), data, prefix=folder.STAGING)
        else:
            self._store.write(path, data)

    def read_bytes(self, key: str) -> bytes:
        """Read an object. Raises AdapterError if it is missing."""
        path = self._path(key)
        try:
            return Path(path).read_bytes() if self.local is not None else self._store.read(path)
        except FileNotFoundError:
            raise AdapterError(f"artifact {key!r} is not in {self.root}.", "Check the name.") from None
