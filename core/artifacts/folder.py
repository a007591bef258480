"""Directories in a local or shared folder: written beside, flushed to the disk, then renamed."""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from core.artifacts.manifest import directory_digest
from core.errors import AdapterError
from core.files import flush, replace_file

STAGING: Final = ".staging-"
ABANDONED_SECONDS: Final = 24 * 3600
"""Age from which on what a killed process has left is deleted."""


def put_directory(source: Path, target: Path, key: str) -> None:
    """Store a directory: readers see all of it or nothing, also after the machine has crashed.

    Raises:
        AdapterError: the name has other contents.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    if not target.exists():
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=target.parent))
        try:
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
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    if directory_digest(target) != directory_digest(source):
        raise AdapterError(f"artifact {key!r} exists with other contents.", "A name is never reused.")


def write_bytes(target: Path, data: bytes) -> None:
    """Write a file in one step."""
    replace_file(target, data, prefix=STAGING)


def delete(target: Path) -> None:
    """Delete a directory, or a file: readers see all of it or nothing. No error where there is none."""
    with suppress(FileNotFoundError):
        if not target.is_dir():
            target.unlink()
            return
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=target.parent))
        try:
            target.rename(staging / target.name)
            flush(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of everything below each name in a folder; what is not complete is left out."""
    return {
        path.name: sum(file_size(file) for file in ([path] if path.is_file() else path.rglob("*")))
        for path in (folder.iterdir() if folder.is_dir() else ())
        if not path.name.startswith(".")
    }


def file_size(path: Path) -> int:
    """Bytes of a file; 0 where there is none any more, and of a directory."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:  # another process deletes it
        return 0


def remove_abandoned(folder: Path) -> None:
    """Delete what processes that were killed have left in a folder a day ago or longer."""
    for path in folder.glob(f"{STAGING}*"):
        try:
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except FileNotFoundError:  # another process did
            continue
