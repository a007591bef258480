"""Atomic replacement of files: readers see the old or the new content, also after a crash."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int = 0o644, prefix: str = "", durable: bool = True) -> Iterator[Path]:
    """Yield a new file next to ``path``, with its suffix, which replaces ``path`` at the end. Creates missing folders.
    After an error the old content stays, and the new file is removed. ``prefix``: of the temporary name; default: a dot
    and its own name. ``durable`` flushes to disk first. Without, a machine crash may leave the file damaged: only for
    large files that are checked on reading, and can be recreated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(suffix=path.suffix, prefix=prefix or f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    staging = Path(name)
    try:
        yield staging
        staging.chmod(mode)
        if durable:
            flush(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes, mode: int = 0o644, prefix: str = "") -> None:
    """Write a file atomically; arguments as for :func:`replacing`. Raises OSError; the old content then stays."""
    with replacing(path, mode, prefix) as staging:
        staging.write_bytes(data)


@contextmanager
def folder_next_to(path: Path, prefix: str = "") -> Iterator[Path]:
    """A new folder next to ``path``, removed at the end unless it was moved. ``prefix``: of its name; default: a dot
    and the name of ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix or f".{path.name}-", dir=path.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_private(path: Path) -> None:
    """Create an empty file, and its folder, that only this user can read; existing ones stay as they are."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        path.touch(mode=0o600)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
