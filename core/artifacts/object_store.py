"""Objects and directories in an object store, through fsspec, with time limits per call. A directory's manifest is
written last."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import fsspec

from core.artifacts.cache import Cache
from core.artifacts.folder import MARKER, Manifest, directory_digest
from core.dependencies import storage_state
from core.errors import AdapterError, ArtifactsUnavailable

CALL_SECONDS: Final = 10.0
"""Limit on a call without much data, retries included."""
LEAST_BYTES_PER_SECOND: Final = 1 << 20
"""Transfers may take longer by the time that their size needs at this rate."""
LISTING_BYTES: Final = 300 << 20
"""Transfer size assumed for listing all objects: a page of 1,000 names takes 0.1 s, and there may be more than a
thousand pages."""
_S3: Final[dict[str, Any]] = {
    "connect_timeout": 3, "read_timeout": 8, "retries": {"max_attempts": 2, "mode": "standard"},
}  # fmt: skip
"""botocore's limits in seconds, to connect and without a byte."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Listings are not cached: others write, too."""
    protocol = fsspec.core.split_protocol(url)[0]
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        options = {"config_kwargs": _S3, "use_listings_cache": False}
    filesystem, root = fsspec.core.url_to_fs(url, **options)
    return filesystem, str(root)


def local_folder(filesystem: Any, root: str) -> Path | None:
    protocol = filesystem.protocol
    return Path(root) if "file" in ((protocol,) if isinstance(protocol, str) else protocol) else None


class ObjectStore:
    """Reads and writes objects by path. Methods raise ArtifactsUnavailable if the store does not answer in time, denies
    access, or lacks the bucket, and FileNotFoundError for a missing object."""

    def __init__(self, filesystem: Any, seconds: float = CALL_SECONDS) -> None:
        self.filesystem = filesystem
        self.seconds = seconds

    def has(self, path: str) -> bool:
        try:
            return bool(self._call(self.filesystem.info, path)["type"] == "file")  # isfile returns False for any error
        except FileNotFoundError:
            return False

    def sizes(self, path: str) -> dict[str, int]:
        prefix = self.filesystem._strip_protocol(path)
        try:
            listed = self._call(self.filesystem.find, path, size=LISTING_BYTES, detail=True)
        except FileNotFoundError:
            return {}
        return {name[len(prefix) :].lstrip("/"): int(each.get("size") or 0) for name, each in listed.items()}

    def read(self, path: str) -> bytes:
        return bytes(self._call(self.filesystem.cat_file, path))

    def write(self, path: str, data: bytes) -> None:
        self._call(self.filesystem.pipe_file, path, data, size=len(data))

    def upload(self, source: Path, path: str) -> None:
        self._call(self.filesystem.put_file, str(source), path, size=source.stat().st_size)

    def download(self, path: str, target: Path, size: int) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        self._call(self.filesystem.get_file, path, str(target), size=size)

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._call(self.filesystem.rm_file, path)

    def _call(self, method: Callable[..., Any], *arguments: Any, size: int = 0, **options: Any) -> Any:
        if self.filesystem.async_impl:  # others are in memory, or cannot be interrupted
            options["timeout"] = self.seconds + size / LEAST_BYTES_PER_SECOND
        try:
            return method(*arguments, **options)
        except Exception as error:  # every store has its own exception tree
            if isinstance(error, FileNotFoundError) and "bucket does not exist" not in str(error):
                raise
            state, cause = storage_state(error)
            raise ArtifactsUnavailable(
                f"the artifacts' object store cannot be used now: {cause}.",
                "What is in service goes on. Check artifacts_url, the credentials and the store.",
                state,
            ) from error


class Bucket:
    """Directories in an object store. It has no rename, so a directory exists when its manifest does. Leftovers of an
    interrupted upload are invisible to readers, and the next upload overwrites them."""

    def __init__(self, store: ObjectStore, cache: Cache) -> None:
        self.store = store
        self.cache = cache

    def exists(self, path: str) -> bool:
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
        """A verified local copy. An existing copy needs no object store."""
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
            if not local.has_all(target):  # and no other process has copied it meanwhile
                shutil.rmtree(target, ignore_errors=True)  # incomplete, e.g. after a cleanup of temporary files
                try:
                    staging.rename(target)
                except OSError:
                    if not local.has_all(target):  # otherwise another process was faster
                        raise
        self.cache.write_note(key, local.dump())
        self.cache.evict()
        return target

    def delete(self, path: str) -> None:
        """Delete a directory, or an object. The manifest goes first: after an interruption the rest is not a complete
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
        if self.store.sizes(path):
            return AdapterError(
                f"the upload of artifact {key!r} was interrupted: it is incomplete.",
                "Store it again; that completes it.",
            )
        return AdapterError(f"artifact {key!r} is not in the object store.", "See `ratchet releases list`.")

    def _damaged(self, key: str) -> AdapterError:
        return AdapterError(f"artifact {key!r} arrived damaged.", "Fetch it again; check the object store.")
