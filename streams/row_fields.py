"""Checked values of the fields of a data set's row: strings, lists, times, base64 images, and files of its folder.

Each raises a `RecordError` that names the row, the field, what is wrong and what to do.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final

from streams.tables import Where

TAG_SEPARATOR: Final = ";"
MAX_NAME_BYTES: Final = 255


def text_field(row: Mapping[str, Any], name: str, where: Where) -> str:
    """The string `name`, stripped; empty where there is none."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise where.error(name, f"is a {type(value).__name__}", "write it as a string")
    return value.strip()


def inside(root: Path, name: str, where: Where, must_exist: bool = True) -> Path:
    """The file `name` under `root`, refused when it leads out of it."""
    if not name:
        raise where.error("file", "is empty", "name an image file, relative to the folder")
    # A backslash is a separator on Windows alone; refusing it keeps a dataset portable and its check simple.
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise where.error(
            "file", f"'{name}' leads out of the folder", "copy the image in; use a path like photos/a.png"
        )
    # What is longer makes `is_file` raise.
    if any(len(part.encode(errors="surrogateescape")) > MAX_NAME_BYTES for part in pure.parts) or len(name) > 2048:
        raise where.error("file", f"'{name[:80]}...' is longer than any path", "shorten the file's name")
    base = root.resolve()
    target = Path(os.path.realpath(base / name))
    if not target.is_relative_to(base):
        raise where.error("file", f"'{name}' is a link out of the folder", "copy the image into the folder")
    if must_exist and not target.is_file():
        raise where.error("file", f"'{name}' does not exist under {root}", "add the image, or drop the row")
    return target


def decode_base64(encoded: str, where: Where) -> bytes:
    """The image of a field `image`: base64, or a `data:` URI."""
    if encoded.startswith("data:"):
        head, comma, encoded = encoded.partition(",")
        if not comma or not head.endswith(";base64"):
            raise where.error("image", "is a data: URI, not in base64", "write data:image/png;base64,...")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise where.error("image", f"not base64 ({error})", "encode the image file as base64") from error


def iso_time(value: str, where: Where) -> str:
    """An ISO 8601 time as one in UTC; it is UTC where it names no zone. Empty for empty."""
    if not value:
        return ""
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    except (ValueError, OverflowError) as error:  # year 1 or 9999, moved to UTC, is out of range
        raise where.error("time", f"'{value[:40]}' is no ISO 8601 time", "write 2026-01-31T12:00:00Z") from error


def list_field(row: Mapping[str, Any], name: str, where: Where) -> tuple[str, ...]:
    """The list of strings `name`, or the parts of a string between `;`."""
    value = row.get(name)
    if value is None:
        return ()
    parts = value.split(TAG_SEPARATOR) if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise where.error(name, "is not a list of strings", 'write ["red", "round"], or "red;round"')
    return tuple(part.strip() for part in parts if part.strip())
