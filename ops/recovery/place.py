"""Files under a URL: a folder, or an object store that fsspec knows. Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from core.artifacts.folder import STAGING, file_size
from core.artifacts.object_store import ObjectStore, local_folder, open_filesystem
from core.errors import StoreError
from core.files import replace_file, replacing

CHUNK: Final = 8 << 20
CALL_SECONDS: Final = 60.0


class Place:
    """Names are relative to the URL, separated by ``/``. Methods raise ArtifactsUnavailable while it is unavailable."""

    def __init__(self, url: str) -> None:
        self.url = url
        filesystem, self._root = open_filesystem(url)
        self.local = local_folder(filesystem, self._root)
        self._store = ObjectStore(filesystem, CALL_SECONDS)

    def files(self, below: str = "") -> dict[str, int]:
        """Size of each file below a name, by full name, without unfinished files."""
        prefix = f"{below}/" if below else ""
        if self.local is None:
            sizes = self._store.sizes(f"{self._root}/{below}" if below else self._root)
        else:
            folder = self.local / below
            sizes = {
                path.relative_to(folder).as_posix(): file_size(path)
                for path in (folder.rglob("*") if folder.is_dir() else ())
                if path.is_file()
            }
        return {f"{prefix}{name}": size for name, size in sizes.items() if name and STAGING not in name}

    def has(self, name: str) -> bool:
        return (self.local / name).is_file() if self.local else self._store.has(f"{self._root}/{name}")

    def read(self, name: str) -> bytes:
        """Read a file. Raises FileNotFoundError."""
        return (self.local / name).read_bytes() if self.local else self._store.read(f"{self._root}/{name}")

    def write(self, name: str, data: bytes) -> None:
        if self.local:
            replace_file(self.local / name, data, prefix=STAGING)
        else:
            self._store.write(f"{self._root}/{name}", data)

    def delete(self, name: str) -> None:
        if self.local:
            (self.local / name).unlink(missing_ok=True)
        else:
            self._store.delete(f"{self._root}/{name}")

    @contextmanager
    def opened(self, name: str, size: int) -> Iterator[Path]:
        """A local copy of a file of ``size`` bytes, or the file itself. Raises FileNotFoundError."""
        if self.local:
            yield self.local / name
            return
        with tempfile.TemporaryDirectory(prefix="ratchet-copy-") as folder:
            path = Path(folder) / name.rpartition("/")[2]
            self._store.download(f"{self._root}/{name}", path, size)
            yield path

    def put(self, source: Path, name: str) -> None:
        if self.local:
            with replacing(self.local / name, prefix=STAGING) as staging:
                shutil.copyfile(source, staging)
        else:
            self._store.upload(source, f"{self._root}/{name}")


def copy(
    source: Place, name: str, size: int, target: Place, as_name: str, digest: str | None = None
) -> tuple[int, str]:
    """Copy a file; returns size and SHA-256. Raises StoreError when it differs from ``digest``, FileNotFoundError."""
    if size <= CHUNK:  # in one piece: another process may replace it meanwhile
        data = source.read(name)
        actual = hashlib.sha256(data).hexdigest()
        check(name, actual, digest)
        target.write(as_name, data)
        return len(data), actual
    with source.opened(name, size) as path:
        actual = file_digest(path)
        check(name, actual, digest)
        target.put(path, as_name)
        return path.stat().st_size, actual


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(name: str, actual: str, digest: str | None) -> None:
    """Raise StoreError when a digest differs from the expected one."""
    if digest is not None and actual != digest:
        raise StoreError(f"{name} of the backup is damaged: its SHA-256 is another one.", "Use another backup.")
