"""Files that are replaced whole: readers see the old content or the new one, also after a crash."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_file(path: Path, data: bytes, mode: int = 0o644, prefix: str = "") -> None:
    """Write a file, and its folders where they are missing. Raises OSError; the old content stays then.

    Args:
        prefix: of the name that it has until it is complete; by default a dot and its own name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=prefix or f".{path.name}.", dir=path.parent)
    staging = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staging.chmod(mode)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
