"""CSV and JSON Lines files, read row by row in bounded memory, each with the line that it came from.

A row that cannot be read is yielded as the `RecordError` that says why, and reading goes on behind it. A file that
holds no table at all, or a row beyond `MAX_ROW_CHARS`, raises: what follows cannot be told apart.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
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
