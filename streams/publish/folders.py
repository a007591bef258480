"""The folder dataset: a directory of images with a `data.csv`. `ratchet publish` sends it, gate suites score it, and
the base and the reference pool are made from it.

Columns, in any order: `file` and `text` are required; `label`, `concept`, `split`, `domain`, `source`, `time`, `tags`,
`question`, `answer` and `answers` are optional; others are ignored. `file` is a path inside the folder; it may not lead
out of it, not even through a symbolic link. `text` may be empty if `question` and `answer` are both given. A row
without `split` belongs to every split. `domain` defaults to the folder's name; `time` is ISO 8601 (UTC without a zone);
`tags` are separated by `;`, as are `answers`, all correct ones, which default to `answer`.

A single `.csv` or `.jsonl` file with the same fields is read too; its `image` field may hold the image itself (base64,
or a `data:` URI) instead of `file`. Rows are read one by one in bounded memory. A bad row yields a `RecordError` that
names the row, the field, the problem and the fix, and reading continues after it. A file without a table, or a JSON
line beyond `MAX_ROW_CHARS`, raises: what follows cannot be parsed.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final, TextIO

from core.errors import ConfigError, RecordError
from core.files import replacing

MAX_IMAGE_BYTES: Final = 64 * 2**20
"""Larger image files are rejected unread; ingest has its own, lower bound."""
MAX_ROW_CHARS: Final = MAX_IMAGE_BYTES * 4 // 3 + 2**20
"""A base64 image of `MAX_IMAGE_BYTES`, with 4 characters per 3 bytes, and its texts."""
MAX_COLUMNS: Final = 1024
INDEX: Final = "data.csv"
COLUMNS: Final = (
    "file", "text", "label", "concept", "split", "domain", "source", "time", "tags", "question", "answer", "answers",
)  # fmt: skip
_LISTS: Final = ("tags", "answers")
MAX_SPLITS_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class FolderItem:
    """One image with its text. Strings are empty if the row had no value."""

    path: Path
    """The image file; for an inline image, a name for it."""
    text: str
    label: str = ""
    concept: str = ""
    split: str = ""
    domain: str = ""
    source: str = ""
    time: str = ""
    """ISO 8601 with a zone, or empty."""
    tags: tuple[str, ...] = ()
    question: str = ""
    answer: str = ""
    answers: tuple[str, ...] = ()
    """Reference answers, including `answer` where people gave it; empty if only `answer` counts."""
    inline: bytes | None = field(default=None, repr=False)

    def bytes(self, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """The encoded image. Raises `RecordError` if it is missing, or larger than `max_bytes`."""
        if self.inline is not None:
            return self.inline
        try:
            size = self.path.stat().st_size
            if size > max_bytes:
                raise dataset_error(
                    f"image {self.path} has {size} bytes; the limit is {max_bytes}",
                    fix="shrink the image, or take its row out of the dataset",
                )
            return self.path.read_bytes()
        except OSError as error:
            raise dataset_error(
                f"image {self.path} cannot be read: {error.strerror or error}",
                fix="put the file back, or take its row out of the dataset",
            ) from error


@dataclass(frozen=True, slots=True)
class DatasetRow:
    """A row of a data set: its sample, or the error that makes it unusable."""

    place: str
    content: FolderItem | RecordError

    def __post_init__(self) -> None:
        # The frames of an error reference the row and the error itself: a cycle that keeps an image, for each bad row.
        if isinstance(self.content, RecordError):
            self.content.__traceback__ = self.content.__cause__ = self.content.__context__ = None


def read_folder(path: Path | str, split: str | None = None) -> list[FolderItem]:
    """Read the folder dataset at `path`, in file order, optionally only one `split`. Raises `RecordError` naming file,
    line, field and fix at the first bad row, and if nothing belongs to `split`."""
    root = Path(path)
    index = root / INDEX
    if not index.is_file():
        problem = f"has no {INDEX}" if root.is_dir() else "is not a folder"
        raise dataset_error(
            f"{root} {problem}, so it is not a folder dataset",
            fix=f"name a folder with images and a {INDEX} that has the columns file,text",
        )
    items = []
    for row in select_split(read_index(index), index, split):
        if isinstance(row.content, RecordError):
            raise row.content
        items.append(row.content)
    return items


def read_index(index: Path) -> Iterator[DatasetRow]:
    """Yield the rows of a `.csv` or `.jsonl` file with the columns of a folder dataset. Raises `RecordError` if there
    is no such table."""
    root, folder = index.parent.resolve(), index.parent
    for where, row in table_rows(index, partial(_check_header, index=index)):
        try:
            content = row if isinstance(row, RecordError) else _item(row, root, folder, where)
        except RecordError as error:
            content = error
        yield DatasetRow(str(where), content)


def select_split(rows: Iterable[DatasetRow], source: Path, split: str | None) -> Iterator[DatasetRow]:
    """Yield the rows of `split` (None: all), and all bad rows. Raises `RecordError` at the end if nothing belongs to
    `split`."""
    seen: set[str] = set()
    chosen = 0
    for row in rows:
        if isinstance(row.content, FolderItem) and split is not None:
            if len(seen) < MAX_SPLITS_SHOWN:
                seen.add(row.content.split)
            if row.content.split not in ("", split):
                continue
        chosen += 1
        yield row
    if split is not None and not chosen:
        known = ", ".join(sorted(seen)) or "no rows"
        raise dataset_error(
            f"{source} has nothing in split '{split}'; it has: {known}",
            fix="name one of these splits, or leave the split out",
        )


def write_folder(path: Path | str, items: Iterable[FolderItem]) -> Path:
    """Write `items` as the folder dataset at `path`, and return `path`. Item paths are inside `path`, or relative to
    it; inline images are written there, others must exist. `data.csv` appears last and atomically; the same items give
    the same bytes."""
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    with replacing(root / INDEX) as staging, staging.open("w", encoding="utf-8", newline="") as stream:
        # CRLF as in RFC 4180; with "\n" alone, Python before 3.13 leaves a lone "\r" in a text unquoted.
        rows = csv.writer(stream, lineterminator="\r\n")
        rows.writerow(COLUMNS)
        for number, item in enumerate(items, start=2):
            place = item.path.relative_to(root) if item.path.is_relative_to(root) else item.path
            where = Where(root / INDEX, f"line {number}")
            target = inside(root, place.as_posix(), where, must_exist=item.inline is None)
            if item.inline is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(item.inline)
            rows.writerow([place.as_posix(), *(_cell(item, name) for name in COLUMNS[1:])])
    return root


def _check_header(names: Sequence[str], index: Path) -> None:
    missing = [name for name in ("text",) if name not in names]
    if "file" not in names and "image" not in names:
        missing.insert(0, "file")
    if missing:
        only_one = len(names) == 1 and any(mark in names[0] for mark in ";\t|")
        raise dataset_error(
            f"{index}, line 1, field '{missing[0]}': no such column; the header has {list(names) or 'nothing'}",
            fix="separate the columns by commas" if only_one else "the first line must be: file,text",
        )


def _item(row: Mapping[str, Any], root: Path, folder: Path, where: Where) -> FolderItem:
    """`root` is the resolved `folder`; items keep the folder's path as the caller wrote it."""
    values = {name: text_field(row, name, where) for name in COLUMNS if name not in _LISTS}
    question, answer = values["question"], values["answer"]
    if bool(question) != bool(answer):
        absent = "answer" if question else "question"
        raise where.error(absent, "is empty, its counterpart is not", "give both question and answer")
    answers = list_field(row, "answers", where)
    if answers and not answer:
        raise where.error("answer", "is empty, but there are answers", "give the best of them as answer")
    if not values["text"] and not question:
        raise where.error("text", "is empty", "describe the image, or take the row out")
    encoded = text_field(row, "image", where)
    inline: bytes | None = None
    if encoded:
        if values["file"]:
            raise where.error("image", "the row has both file and image", "keep one of them")
        inline = decode_base64(encoded, where)
        path = Path(f"{where.file.name}#{where.place.removeprefix('line ')}")
    else:
        inside(root, values["file"], where)
        path = folder / values["file"]
    values["domain"] = values["domain"] or (where.file.stem if where.file.name != INDEX else root.name)
    values["time"] = iso_time(values["time"], where)
    del values["file"]
    return FolderItem(path, **values, tags=list_field(row, "tags", where), answers=answers, inline=inline)


def _cell(item: FolderItem, name: str) -> str:
    value = getattr(item, name)
    return TAG_SEPARATOR.join(part.replace(TAG_SEPARATOR, ",") for part in value) if name in _LISTS else str(value)


@contextmanager
def writing(path: Path, fix: str) -> Iterator[None]:
    """Turn an OSError into a ConfigError that says that ``path`` cannot be written."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}.", fix) from error


def dataset_error(problem: str, fix: str) -> RecordError:
    """An error, with the reason ``dataset``, about a data set or one of its rows."""
    return RecordError("dataset", f"{problem}.", f"{fix[0].upper()}{fix[1:]}.")


@dataclass(frozen=True, slots=True)
class Where:
    file: Path
    place: str
    """``line 7``, ``row 12`` or ``sample 000123``."""

    def __str__(self) -> str:
        return f"{self.file}, {self.place}"

    def error(self, name: str, problem: str, fix: str) -> RecordError:
        return dataset_error(f"{self}, field '{name}': {problem}", fix)

    def row_error(self, problem: str, fix: str) -> RecordError:
        return dataset_error(f"{self}: {problem}", fix)


TableRow = tuple[Where, Mapping[str, Any] | RecordError]
JSON_LINES: Final = (".jsonl", ".ndjson")


def table_rows(path: Path, check_header: Callable[[Sequence[str]], None]) -> Iterator[TableRow]:
    return jsonl_rows(path) if path.suffix.lower() in JSON_LINES else csv_rows(path, check_header)


def csv_rows(path: Path, check_header: Callable[[Sequence[str]], None]) -> Iterator[TableRow]:
    """Rows of a CSV file (UTF-8, comma separated, with a header), as strings by column. ``check_header`` gets the
    column names, and raises `RecordError` if they are unsuitable. Also raises `RecordError` for a row longer than
    `MAX_ROW_CHARS`."""
    # Python's own limit of 131,072 characters is below that of a base64 image.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_CHARS))
    # Invalid UTF-8 becomes lone surrogates, so that one such row does not end the reading.
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
            lines.size = 0
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


@dataclass
class _Lines:
    stream: TextIO
    path: Path
    size: int = 0
    """Characters of the current row so far."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.stream.readline(MAX_ROW_CHARS + 1 - self.size)
        self.size += len(line)
        if self.size > MAX_ROW_CHARS:
            raise dataset_error(
                f"{self.path} has a row of more than {MAX_ROW_CHARS} characters",
                "shrink the image in it, or close the quote that was left open",
            )
        if not line:
            raise StopIteration
        return line


def jsonl_rows(path: Path) -> Iterator[TableRow]:
    """Rows of a JSON Lines file; empty lines are skipped. Raises RecordError for a line longer than `MAX_ROW_CHARS`
    bytes."""
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
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise where.error(name, f"is a {type(value).__name__}", "write it as a string")
    return value.strip()


def inside(root: Path, name: str, where: Where, must_exist: bool = True) -> Path:
    """The file `name` under `root`. Raises RecordError if it leads out of it."""
    if not name:
        raise where.error("file", "is empty", "name an image file, relative to the folder")
    # A backslash is a separator only on Windows; rejecting it keeps datasets portable and the check simple.
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise where.error(
            "file", f"'{name}' leads out of the folder", "copy the image in; use a path like photos/a.png"
        )
    # Longer names make `is_file` raise.
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
    if encoded.startswith("data:"):
        head, comma, encoded = encoded.partition(",")
        if not comma or not head.endswith(";base64"):
            raise where.error("image", "is a data: URI, not in base64", "write data:image/png;base64,...")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise where.error("image", f"not base64 ({error})", "encode the image file as base64") from error


def iso_time(value: str, where: Where) -> str:
    """Convert an ISO 8601 time to UTC, which is also assumed without a zone. Empty stays empty."""
    if not value:
        return ""
    try:
        moment = datetime.fromisoformat(value)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).isoformat()
    except (ValueError, OverflowError) as error:  # year 1 or 9999, moved to UTC, is out of range
        raise where.error("time", f"'{value[:40]}' is no ISO 8601 time", "write 2026-01-31T12:00:00Z") from error


def list_field(row: Mapping[str, Any], name: str, where: Where) -> tuple[str, ...]:
    value = row.get(name)
    if value is None:
        return ()
    parts = value.split(TAG_SEPARATOR) if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise where.error(name, "is not a list of strings", 'write ["red", "round"], or "red;round"')
    return tuple(part.strip() for part in parts if part.strip())
