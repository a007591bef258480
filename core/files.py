"""Files that are replaced whole: readers see the old content or the new one, also after a crash."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int = 0o644, prefix: str = "", durable: bool = True) -> Iterator[Path]:
    """Yield a new file next to ``path``, with its suffix; what is written there takes the place of ``path`` at the end.

    Folders that are missing are made. After an error the old content stays, and the new file is removed.

    >>> with replacing(path) as staging:
    ...     np.savez(staging, rows=rows)

    Args:
        mode: permissions of the file.
        prefix: of the name that it has until it is complete; by default a dot and its own name.
        durable: bring it to the disk before it takes the place. Without, a crash of the machine may leave it damaged:
            for large files that are checked when they are read, and can be made again.
    """
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
    """Write a file whole; arguments as of :func:`replacing`. Raises OSError; the old content stays then."""
    with replacing(path, mode, prefix) as staging:
        staging.write_bytes(data)


def flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
