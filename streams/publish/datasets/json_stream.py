"""JSON documents larger than memory: the elements of their arrays one at a time, and an index of some of them on
disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import ijson

from streams.publish.row_files import dataset_error

MAX_ELEMENT_BYTES: Final = 16 * 2**20
"""Longest element of an array, and longest text in what is passed over."""
MAX_DEPTH: Final = 32
BUFFER_BYTES: Final = 64 * 1024
COMMIT_ROWS: Final = 10_000
_OPEN: Final = ("start_map", "start_array")
_CLOSE: Final = ("end_map", "end_array")
TOP: Final = ""
"""The name of the array that is the document itself."""


class _Bounded:
    """A file of which only so much is read until `reset`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("rb")
        self._since = 0

    def reset(self) -> None:
        self._since = 0

    def read(self, size: int) -> bytes:
        self._since += size
        if self._since > MAX_ELEMENT_BYTES + size:
            raise dataset_error(f"{self._path} has an element of more than {MAX_ELEMENT_BYTES} bytes", "take it out")
        return self._stream.read(size)

    def close(self) -> None:
        self._stream.close()


def elements(path: Path, arrays: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Name of the array and value, for each element of the arrays of these names in a JSON document, in file order.

    ``TOP`` names the document itself where that is an array. A top-level value that is no array is yielded whole where
    it is a string or a number. Memory: one element.

    Raises:
        RecordError: the file is no JSON, or holds an element that is too large or too deep.
    """
    file = _Bounded(path)
    number = 0
    try:
        for element in _elements(file, path, arrays):
            number += 1
            yield element
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
        problem = f"{path}, after element {number}: not JSON ({str(error).strip()[:160]})"
        raise dataset_error(problem, "write it again, or copy it again") from error
    finally:
        file.close()


def _elements(file: _Bounded, path: Path, arrays: Collection[str]) -> Iterator[tuple[str, Any]]:
    depth = 0
    key, array = TOP, ""  # the last name at the top, and the array that is open
    inside = -1  # the depth of that array's elements; -1 where none is open
    builder: ijson.ObjectBuilder | None = None
    # Not `ijson.parse`: it makes a path for each event, which costs the square of the depth.
    for event, value in ijson.basic_parse(file, use_float=True, buf_size=BUFFER_BYTES):
        if builder is None:
            file.reset()
        depth -= event in _CLOSE
        if builder is not None:
            builder.event(event, value)
        elif event == "map_key":
            key = value if depth == 1 else key
        elif event in _CLOSE:
            inside = -1 if depth < inside else inside
        elif depth == inside:
            builder = ijson.ObjectBuilder()
            builder.event(event, value)
        elif event == "start_array" and inside < 0 and depth <= 1 and key in arrays:
            array, inside = key, depth + 1
        elif depth == 1 and key in arrays and event in ("string", "number"):
            yield key, value
        depth += event in _OPEN
        if depth > MAX_DEPTH:
            raise dataset_error(f"{path} is nested deeper than {MAX_DEPTH}", "flatten it")
        if builder is not None and depth == inside:
            yield array, builder.value
            builder = None


class DiskIndex:
    """A table of texts by key in a temporary file: what one part of a document refers to in another."""

    def __init__(self) -> None:
        self._base = sqlite3.connect("")  # an empty name: a file that SQLite deletes, beyond its cache
        self._base.execute("PRAGMA synchronous=OFF")
        self._base.execute("CREATE TABLE entries (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")
        self._uncommitted = 0

    def put(self, key: object, value: str) -> None:
        """Remember a value; a later one of the same key replaces it."""
        self._base.execute("INSERT OR REPLACE INTO entries VALUES (?, ?)", (str(key), value))
        self._uncommitted += 1
        if self._uncommitted >= COMMIT_ROWS:
            self._base.commit()
            self._uncommitted = 0

    def get(self, key: object) -> str | None:
        """The value of a key."""
        row = self._base.execute("SELECT value FROM entries WHERE key = ?", (str(key),)).fetchone()
        return None if row is None else str(row[0])

    def __enter__(self) -> DiskIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._base.close()
