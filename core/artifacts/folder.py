"""Artifact directories: digest and manifest, and storage in a local or shared folder. In a folder a directory is
written next to its place, flushed to disk, then renamed. In an object store the manifest is written last, so a
directory with a manifest is complete."""

from __future__ import annotations

import json
import re
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from core.digests import digest_bytes
from core.errors import AdapterError
from core.files import flush, folder_next_to

MARKER: Final = ".complete"
MAX_FILES: Final = 100_000


def directory_digest(directory: Path) -> str:
    """SHA-256 over the relative names and contents of all files below ``directory``. 64 hex digits."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return digest_bytes(
        *(part for path in files for part in (str(path.relative_to(directory)).encode(), path.read_bytes()))
    )


@dataclass(frozen=True)
class Manifest:
    """Digest of a directory, and its files with sizes in bytes. Uploads from before version 8 of the ledger's schema
    only have the digest: ``files`` is None."""

    digest: str
    files: dict[str, int] | None

    @classmethod
    def of(cls, directory: Path) -> Manifest:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
        return cls(directory_digest(directory), sizes)

    @classmethod
    def parse(cls, data: bytes, key: str) -> Manifest:
        """Parse and validate a manifest. Raises AdapterError."""
        if re.fullmatch(rb"[0-9a-f]{64}", data.strip()):
            return cls(data.strip().decode(), None)
        try:
            value = json.loads(data)
            digest, files = value["digest"], value["files"]
            if not (re.fullmatch(r"[0-9a-f]{64}", digest) and isinstance(files, dict) and len(files) <= MAX_FILES):
                raise ValueError("digest or files are not as they should be")
            return cls(digest, {name: _size(name, size) for name, size in files.items()})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise AdapterError(
                f"the manifest of artifact {key!r} is damaged: {error}.", "Store the artifact again under a new name."
            ) from None

    def dump(self) -> bytes:
        return json.dumps({"digest": self.digest, "files": self.files}, sort_keys=True).encode()

    def has_all(self, directory: Path) -> bool:
        """True if a directory has every file at its size; contents are not read."""
        if not directory.is_dir() or self.files is None:
            return False
        paths = {directory / name: size for name, size in self.files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def _size(name: str, size: Any) -> int:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or isinstance(size, bool):
        raise ValueError(f"the file {name!r} cannot be in it")
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"the size of {name!r} is {size!r}")
    return size


STAGING: Final = ".staging-"
ABANDONED_SECONDS: Final = 24 * 3600
"""Age at which leftovers of killed processes are deleted."""


def put_directory(source: Path, target: Path, key: str) -> None:
    """Store a directory: readers see all of it or nothing, also after a machine crash. Raises AdapterError if the name
    has other contents."""
    remove_abandoned(target.parent)
    if not target.exists():
        try:
            with folder_next_to(target, STAGING) as staging:
                shutil.copytree(source, staging, dirs_exist_ok=True)
                staging.chmod(0o755)
                for path in (*staging.rglob("*"), staging):
                    flush(path)
                staging.rename(target)
                flush(target.parent)
                return
        except OSError:  # another process was faster
            if not target.exists():
                raise
    if directory_digest(target) != directory_digest(source):
        raise AdapterError(f"artifact {key!r} exists with other contents.", "A name is never reused.")


def delete(target: Path) -> None:
    """Delete a directory or a file: readers see all of it or nothing. A missing one is ignored."""
    with suppress(FileNotFoundError):
        if not target.is_dir():
            target.unlink()
            return
        with folder_next_to(target, STAGING) as staging:
            target.rename(staging / target.name)
            flush(target.parent)


def sizes(folder: Path) -> dict[str, int]:
    """Total bytes below each name in a folder; incomplete entries are left out."""
    return {
        path.name: sum(file_size(file) for file in ([path] if path.is_file() else path.rglob("*")))
        for path in (folder.iterdir() if folder.is_dir() else ())
        if not path.name.startswith(".")
    }


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # another process deletes it
        return 0


def remove_abandoned(folder: Path) -> None:
    """Delete leftovers of killed processes that are at least a day old."""
    for path in folder.glob(f"{STAGING}*"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # another process did
            continue
