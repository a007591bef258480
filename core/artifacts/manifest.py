"""What a directory in an object store consists of. It is written last, so a directory with a manifest is complete."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

from core.digests import digest_bytes
from core.errors import AdapterError

MARKER: Final = ".complete"
"""Name of the manifest in its directory."""
MAX_FILES: Final = 100_000


def directory_digest(directory: Path) -> str:
    """SHA-256 over the relative names and contents of all files below ``directory``. 64 hex digits."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return digest_bytes(
        *(part for path in files for part in (str(path.relative_to(directory)).encode(), path.read_bytes()))
    )


@dataclass(frozen=True)
class Manifest:
    """Digest of a directory, and its files with their sizes in bytes. Uploads before version 8 of the ledger's schema
    recorded the digest alone: ``files`` is None.
    """

    digest: str
    files: dict[str, int] | None

    @classmethod
    def of(cls, directory: Path) -> Manifest:
        """Of a local directory."""
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}
        return cls(directory_digest(directory), sizes)

    @classmethod
    def parse(cls, data: bytes, key: str) -> Manifest:
        """Read and check a manifest. Raises AdapterError."""
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
        """The bytes that :meth:`parse` reads."""
        return json.dumps({"digest": self.digest, "files": self.files}, sort_keys=True).encode()

    def has_all(self, directory: Path) -> bool:
        """Whether a local directory has every file at its size; contents are not read."""
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
