"""CSV and JSON Lines files, read row by row in bounded memory, each with the line that it came from.

A row that cannot be read is yielded as the `RecordError` that says why, and reading goes on behind it. A file that
holds no table at all, or a row beyond `MAX_ROW_CHARS`, raises: what follows cannot be told apart.

Values of a row's fields (strings, lists, times, base64 images, files of the data set's folder) are checked here, too:
each check raises a `RecordError` that names the row, the field, what is wrong and what to do.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final, TextIO

from core.errors import RecordError

MAX_IMAGE_BYTES: Final = 64 * 2**20
"""A single image file above this is refused before it is read; ingest has its own, lower bound."""
MAX_ROW_CHARS: Final = MAX_IMAGE_BYTES * 4 // 3 + 2**20
"""Longest row: a base64 image of `MAX_IMAGE_BYTES`, which takes 4 characters per 3 bytes, and its texts."""
MAX_COLUMNS: Final = 1024


def dataset_error(problem: str, fix: str) -> RecordError:
    """An error about a data set or one of its rows; its reason is ``dataset``."""
    return RecordError("dataset", f"{problem}.", f"{fix[0].upper()}{fix[1:]}.")


@dataclass(frozen=True, slots=True)
class Where:
    """The row that a message is about."""

    file: Path
    place: str
    """Its place in the file: ``line 7``, ``row 12``, ``sample 000123``."""

    def __str__(self) -> str:
        return f"{self.file}, {self.place}"

    def error(self, name: str, problem: str, fix: str) -> RecordError:
        """An error about the field ``name`` of this row."""
        return dataset_error(f"{self}, field '{name}': {problem}", fix)

    def row_error(self, problem: str, fix: str) -> RecordError:
        """An error about all of this row."""
        return dataset_error(f"{self}: {problem}", fix)


TableRow = tuple[Where, Mapping[str, Any] | RecordError]


def csv_rows(path: Path, check_header: Callable[[Sequence[str]], None]) -> Iterator[TableRow]:
    """Rows of a CSV file (UTF-8, comma separated, the first line names the columns), as strings by column.

    Args:
        path: the file.
        check_header: is called with the names of the columns, and raises `RecordError` where they will not do.

    Raises:
        RecordError: the header will not do, or a row is longer than `MAX_ROW_CHARS`.
    """
    # Python's own limit of 131,072 characters is below that of a base64 image.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_CHARS))
    # Bytes that are no UTF-8 become lone surrogates, so that one such row does not end the reading.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        lines = _Lines(stream, path)
        reader = csv.DictReader(lines, strict=True)
        try:
            header = reader.fieldnames or ()
        except csv.Error as error:
            raise dataset_error(f"{path}, line 1: {error}", _QUOTES) from error
        if len(header) > MAX_COLUMNS:
            raise dataset_error(f"{path}, line 1: {len(header)} columns", f"keep at most {MAX_COLUMNS}")
        check_header(header)
        while True:
            line = reader.line_num
            lines.begin_row()
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Where(path, f"after line {line}"), dataset_error(f"{path}, after line {line}: {error}", _QUOTES)
                continue
            where = Where(path, f"line {reader.line_num}")
            yield where, _csv_problem(row, where) or row


_QUOTES = 'quote texts with "..." and double the quotes inside'


def _csv_problem(row: dict[str | Any, Any], where: Where) -> RecordError | None:
    if None in row:
        fix = 'put texts that hold a comma into double quotes: "red, round"'
        return where.error(str(list(row)[-2]), "more values than columns", fix)
    for name, cell in row.items():
        if cell and not cell.isascii() and any("\ud800" <= char <= "\udfff" for char in cell):
            return where.error(name, "is not UTF-8", "save the file as UTF-8")
    return None


class _Lines:
    """Lines of a text file, for the csv module; a row of several lines is bounded, too."""

    def __init__(self, stream: TextIO, path: Path) -> None:
        self._stream = stream
        self._path = path
        self._size = 0

    def begin_row(self) -> None:
        self._size = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_ROW_CHARS + 1 - self._size)
        self._size += len(line)
        if self._size > MAX_ROW_CHARS:
            raise dataset_error(
                f"{self._path} has a row of more than {MAX_ROW_CHARS} characters",
                "shrink the image in it, or close the quote that was left open",
            )
        if not line:
            raise StopIteration
        return line


def jsonl_rows(path: Path) -> Iterator[TableRow]:
    """Rows of a JSON Lines file: an object a line; empty lines are passed over.

    Raises:
        RecordError: a line is longer than `MAX_ROW_CHARS` bytes.
    """
    with path.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW_CHARS + 1), b""), start=1):
            where = Where(path, f"line {number}")
            if len(line) > MAX_ROW_CHARS:
                raise where.row_error(f"is over {MAX_ROW_CHARS} bytes", "shrink the image in it")
            if line.strip():
                yield where, _json_object(line, where)


def _json_object(line: bytes, where: Where) -> Mapping[str, Any] | RecordError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return where.row_error(f"not JSON: {error}", "write one JSON object per line, UTF-8")
    if not isinstance(row, dict):
        fix = 'write one JSON object per line: {"file": "a.png", "text": "a crane"}'
        return where.row_error(f"holds a {type(row).__name__}", fix)
    return row


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
