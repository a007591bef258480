"""Objects and directories in an object store, through fsspec; each call has a bound on its time.

Of a directory the files are written first and the manifest last.
"""

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
"""Longest time of a call that moves no data to speak of, retries included."""
LEAST_BYTES_PER_SECOND: Final = 1 << 20
"""A transfer may take so much longer as its size needs at this rate."""
LISTING_BYTES: Final = 300 << 20
"""A listing of all objects counts as a transfer of so much: a page of 1,000 names takes 0.1 s, and there may be more
than a thousand pages."""
_S3: Final[dict[str, Any]] = {
    "connect_timeout": 3, "read_timeout": 8, "retries": {"max_attempts": 2, "mode": "standard"},
}  # fmt: skip
"""Of botocore: seconds to connect, and without a byte."""


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it. Listings are not cached: others write, too."""
    protocol = fsspec.core.split_protocol(url)[0]
    options: dict[str, Any] = {}
    if protocol in ("s3", "s3a"):
        options = {"config_kwargs": _S3, "use_listings_cache": False}
    filesystem, root = fsspec.core.url_to_fs(url, **options)
    return filesystem, str(root)


def local_folder(filesystem: Any, root: str) -> Path | None:
    """The folder that a file system's path is on this machine; None for an object store."""
    protocol = filesystem.protocol
    return Path(root) if "file" in ((protocol,) if isinstance(protocol, str) else protocol) else None


class ObjectStore:
    """Reads and writes objects by path.

    Every method raises ArtifactsUnavailable when the store does not answer in time, refuses, or lacks the bucket; and
    FileNotFoundError when there is no such object.
    """

    def __init__(self, filesystem: Any, seconds: float = CALL_SECONDS) -> None:
        self.filesystem = filesystem
        self.seconds = seconds

    def has(self, path: str) -> bool:
        """True if there is an object of this name."""
        try:
            return bool(self._call(self.filesystem.info, path)["type"] == "file")  # isfile says no to any error
        except FileNotFoundError:
            return False

    def has_below(self, path: str) -> bool:
        """True if there is any object below this name."""
        return bool(self.sizes(path))

    def sizes(self, path: str) -> dict[str, int]:
        """Objects below a name, by their names from there on, with their sizes in bytes."""
        prefix = self.filesystem._strip_protocol(path)
        try:
            listed = self._call(self.filesystem.find, path, size=LISTING_BYTES, detail=True)
        except FileNotFoundError:
            return {}
        return {name[len(prefix) :].lstrip("/"): int(each.get("size") or 0) for name, each in listed.items()}

    def read(self, path: str) -> bytes:
        """All bytes of an object."""
        return bytes(self._call(self.filesystem.cat_file, path))

    def write(self, path: str, data: bytes) -> None:
        """Write an object whole."""
        self._call(self.filesystem.pipe_file, path, data, size=len(data))

    def upload(self, source: Path, path: str) -> None:
        """Write a file as an object."""
        self._call(self.filesystem.put_file, str(source), path, size=source.stat().st_size)

    def download(self, path: str, target: Path, size: int) -> None:
        """Write an object of ``size`` bytes into a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._call(self.filesystem.get_file, path, str(target), size=size)

    def delete(self, path: str) -> None:
        """Delete an object; no error where there is none."""
        with suppress(FileNotFoundError):
            self._call(self.filesystem.rm_file, path)

    def _call(self, method: Callable[..., Any], *arguments: Any, size: int = 0, **options: Any) -> Any:
        if self.filesystem.async_impl:  # others are in memory, or have no way to be interrupted
            options["timeout"] = self.seconds + size / LEAST_BYTES_PER_SECOND
        try:
            return method(*arguments, **options)
        except Exception as error:  # every store has a tree of errors of its own
            if isinstance(error, FileNotFoundError) and "bucket does not exist" not in str(error):
                raise
            state, cause = storage_state(error)
            raise ArtifactsUnavailable(
                f"the artifacts' object store cannot be used now: {cause}.",
                "What is in service goes on. Check artifacts_url, the credentials and the store.",
                state,
            ) from error


class Bucket:
    """An object store has no rename, so a directory is there when its manifest is. What an upload that was interrupted
    has left is not seen by readers, and is overwritten by the next one.
    """

    def __init__(self, store: ObjectStore, cache: Cache) -> None:
        """``cache``: local copies of what is fetched."""
        self.store = store
        self.cache = cache

    def exists(self, path: str) -> bool:
        """True if there is a complete directory, or an object, of this name."""
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
