"""Artifacts (adapters, gate reports) behind one URL: a folder, or any object store that fsspec knows."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import fsspec

from ops.digests import digest12, digest_bytes
from ops.errors import AdapterError


def directory_digest(directory: Path) -> str:
    """SHA-256 over the relative names and contents of all files below ``directory``."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return digest_bytes(*(part for p in files for part in (str(p.relative_to(directory)).encode(), p.read_bytes())))


class Artifacts:
    """A small key-value view of a folder or bucket. Keys look like ``adapters/clip-0123456789ab``."""

    def __init__(self, url: str, cache: Path | None = None) -> None:
        self.filesystem, self.root = fsspec.core.url_to_fs(url)
        self.local = Path(self.root) if "file" in self._protocols() else None
        default_cache = Path(tempfile.gettempdir()) / f"ratchet-artifacts-{os.getuid()}"
        self.cache = (cache or default_cache) / digest12(url.encode())

    def _protocols(self) -> tuple[str, ...]:
        protocol = self.filesystem.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _path(self, key: str) -> str:
        if not key or key.startswith("/") or ".." in key.split("/"):
            raise AdapterError(f"artifact key {key!r} leaves the artifact folder.", "Use a relative key.")
        return f"{self.root}/{key}"

    def exists(self, key: str) -> bool:
        """Whether a file or a directory of this key is there."""
        return bool(self.filesystem.exists(self._path(key)))

    def put_directory(self, source: Path, key: str) -> None:
        """Store a directory whole. Keys are immutable: the same bytes again are fine, others are refused."""
        if self.exists(key):
            if directory_digest(self.fetch(key)) != directory_digest(source):
                raise AdapterError(f"artifact {key!r} exists with other contents.", "A name is never reused.")
            return
        if self.local is not None:
            target = Path(self._path(key))
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent))
            shutil.copytree(source, staging, dirs_exist_ok=True)
            staging.chmod(0o755)
            staging.rename(target)  # readers see all of it or nothing
            return
        self.filesystem.put(f"{source}/", f"{self._path(key)}/", recursive=True)
        self.write_bytes(f"{key}/.complete", directory_digest(source).encode())

    def fetch(self, key: str) -> Path:
        """A local directory with the contents of ``key``: the thing itself, or a cached, checked copy."""
        if not self.exists(key):
            raise AdapterError(f"artifact {key!r} is not in {self.root}.", "See `ratchet releases list`.")
        if self.local is not None:
            return Path(self._path(key))
        target = self.cache / key
        if target.is_dir():
            return target
        expected = self.read_bytes(f"{key}/.complete").decode()
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent))
        self.filesystem.get(f"{self._path(key)}/", f"{staging}/", recursive=True)
        (staging / ".complete").unlink(missing_ok=True)
        if directory_digest(staging) != expected:
            shutil.rmtree(staging)
            raise AdapterError(f"artifact {key!r} arrived damaged.", "Fetch it again; check the object store.")
        try:
            staging.rename(target)
        except OSError:  # another process cached it first
            shutil.rmtree(staging, ignore_errors=True)
        return target

    def write_bytes(self, key: str, data: bytes) -> None:
        """Write one object; on a folder atomically."""
        path = self._path(key)
        if self.local is None:
            self.filesystem.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{os.getpid()}")
        staging.write_bytes(data)
        staging.replace(target)

    def read_bytes(self, key: str) -> bytes:
        """Read one object."""
        path = self._path(key)
        if not self.filesystem.exists(path):
            raise AdapterError(f"artifact {key!r} is not in {self.root}.", "Check the name.")
        return bytes(self.filesystem.cat_file(path))
