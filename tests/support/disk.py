from __future__ import annotations

from pathlib import Path


def holds(folder: Path | str, needle: bytes) -> bool:
    return any(needle in path.read_bytes() for path in Path(folder).rglob("*") if path.is_file())
