"""The folder dataset: a directory of images with a `data.csv`.

One format everywhere: what `ratchet publish` sends, what gate suites score, what the base is built from
and what the reference pool is drawn from. The smallest one is two columns:

    data.csv                      photos/crane.jpg
    file,text
    photos/crane.jpg,a crowned crane

Columns: `file` and `text` are required; `label`, `concept`, `split`, `domain`, `source`, `time`, `tags`,
`question`, `answer` and `answers` may be left out. Column order is free, and columns of other names are ignored.

- `file` is a path inside the folder; it may not lead out of it, not even through a symbolic link.
- `text` may be empty where `question` and `answer` are both given.
- `split` names a part such as `train` or `test`. A row without one belongs to every split.
- `domain` is the folder's name where it is not given; `time` is ISO 8601 (UTC if it names no zone);
  `tags` are separated by `;`.
- `answers` are all that count as right, separated by `;`; `answer` alone where there is no such column.

A single `.csv` or `.jsonl` file with the same fields is read too; there an `image` field may hold the
image itself (base64, or a `data:` URI) instead of `file`.
"""

from __future__ import annotations

import base64
import binascii
import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Final

from ops.errors import RecordError

INDEX: Final = "data.csv"
COLUMNS: Final = (
    "file",
    "text",
    "label",
    "concept",
    "split",
    "domain",
    "source",
    "time",
    "tags",
    "question",
    "answer",
    "answers",
)
_LISTS: Final = ("tags", "answers")
"""Columns of several values."""
TAG_SEPARATOR: Final = ";"
MAX_IMAGE_BYTES: Final = 64 * 2**20
"""A single image file above this is refused before it is read; ingest has its own, lower bound."""
MAX_FIELD_CHARS: Final = MAX_IMAGE_BYTES * 4 // 3 + 1024
"""Longest field of a row: a base64 image of `MAX_IMAGE_BYTES`, which takes 4 characters per 3 bytes."""


@dataclass(frozen=True, slots=True)
class FolderItem:
    """One image with its text. Strings are empty where the row had no value."""

    path: Path
    """The image file; for an image that came inside the row, a name for it."""
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
    """Reference answers, `answer` among them where people would say it; empty where only `answer` counts."""
    inline: bytes | None = field(default=None, repr=False)
    """The encoded image where it came inside the row."""

    def bytes(self, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
        """The encoded image. Raises `RecordError` when it is gone, or larger than `max_bytes`."""
        if self.inline is not None:
            return self.inline
        try:
            size = self.path.stat().st_size
            if size > max_bytes:
                raise _refuse(
                    f"image {self.path} has {size} bytes; the limit is {max_bytes}",
                    fix="shrink the image, or take its row out of the dataset",
                )
            return self.path.read_bytes()
        except OSError as error:
            raise _refuse(
                f"image {self.path} cannot be read: {error.strerror or error}",
                fix="put the file back, or take its row out of the dataset",
            ) from error


def read_folder(path: Path | str, split: str | None = None) -> list[FolderItem]:
    """The rows of the folder dataset at `path`, in file order; with `split`, only those that belong to it.

    Raises `RecordError` naming file, line, field and fix at the first row that is wrong, and when
    nothing belongs to `split`.
    """
    root = Path(path)
    index = root / INDEX
    if not index.is_file():
        problem = f"has no {INDEX}" if root.is_dir() else "is not a folder"
        raise _refuse(
            f"{root} {problem}, so it is not a folder dataset",
            fix=f"name a folder with images and a {INDEX} that has the columns file,text",
        )
    return _select(_read_csv(index), index, split)


def read_items(path: Path | str, split: str | None = None) -> list[FolderItem]:
    """Rows of a folder dataset, or of a single `.csv` or `.jsonl` file, whichever `path` is."""
    source = Path(path)
    if source.is_dir():
        return read_folder(source, split)
    if not source.is_file():
        raise _refuse(f"{source} does not exist", fix="name a folder, a .csv file or a .jsonl file")
    match source.suffix.lower():
        case ".csv":
            return _select(_read_csv(source), source, split)
        case ".jsonl" | ".ndjson":
            return _select(_read_jsonl(source), source, split)
    raise _refuse(
        f"{source} is neither a folder, nor a .csv, nor a .jsonl file",
        fix="name a folder dataset, or a file with one record per row that ends in .csv or .jsonl",
    )


def write_folder(path: Path | str, items: Iterable[FolderItem]) -> Path:
    """Write `items` as the folder dataset at `path`, and return `path`.

    An item's path is inside `path`, or relative to it. Images held inline are written there; others must be
    in place already. `data.csv` appears last and atomically; same items, same bytes.
    """
    root = Path(path)
    root.mkdir(parents=True, exist_ok=True)
    partial = root / f".{INDEX}.partial"
    with partial.open("w", encoding="utf-8", newline="") as stream:
        # CRLF as in RFC 4180; with "\n" alone, Python before 3.13 leaves a lone "\r" in a text unquoted.
        rows = csv.writer(stream, lineterminator="\r\n")
        rows.writerow(COLUMNS)
        for number, item in enumerate(items, start=2):
            place = item.path.relative_to(root) if item.path.is_relative_to(root) else item.path
            where = _Where(root / INDEX, number)
            target = _inside(root, place.as_posix(), where, must_exist=item.inline is None)
            if item.inline is not None:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(item.inline)
            rows.writerow([place.as_posix(), *(_cell(item, name) for name in COLUMNS[1:])])
    partial.replace(root / INDEX)
    return root


def _refuse(problem: str, fix: str) -> RecordError:
    return RecordError("folder", f"{problem}.", f"{fix[0].upper()}{fix[1:]}.")


@dataclass(frozen=True, slots=True)
class _Where:
    """The row that a message is about."""

    file: Path
    line: int

    def error(self, name: str, problem: str, fix: str) -> RecordError:
        return _refuse(f"{self.file}, line {self.line}, field '{name}': {problem}", fix=fix)


def _read_csv(index: Path) -> Iterator[FolderItem]:
    # Python's own limit of 131,072 characters is below that of a base64 image.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARS))
    root = index.parent.resolve()
    line = 1
    try:
        with index.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            _check_header(reader.fieldnames or (), index)
            for row in reader:
                where = _Where(index, line := reader.line_num)
                if None in row:
                    raise where.error(
                        str(list(row)[-2]),
                        "more values than columns",
                        fix='put texts that hold a comma into double quotes: "red, round"',
                    )
                yield _item(row, root, index.parent, where)
    except csv.Error as error:
        raise _refuse(
            f"{index}, after line {line}: {error}", fix='quote texts with "..." and double the quotes inside'
        ) from error
    except UnicodeDecodeError as error:
        raise _refuse(
            f"{index}, after line {line}: not UTF-8 ({error.reason} at byte {error.start})",
            fix="save the file as UTF-8",
        ) from error


def _check_header(names: Iterable[str], index: Path) -> None:
    header = list(names)
    missing = [name for name in ("text",) if name not in header]
    if "file" not in header and "image" not in header:
        missing.insert(0, "file")
    if missing:
        only_one = len(header) == 1 and any(mark in header[0] for mark in ";\t|")
        raise _refuse(
            f"{index}, line 1, field '{missing[0]}': no such column; the header has {header or 'nothing'}",
            fix="separate the columns by commas" if only_one else "the first line must be: file,text",
        )


def _read_jsonl(source: Path) -> Iterator[FolderItem]:
    root = source.parent.resolve()
    with source.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(MAX_FIELD_CHARS + 1), b""), start=1):
            where = _Where(source, number)
            if len(line) > MAX_FIELD_CHARS:
                raise where.error("image", f"the line is over {MAX_FIELD_CHARS} bytes", "shrink the image")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
                raise _refuse(
                    f"{source}, line {number}: not JSON: {error}", fix="write one JSON object per line, UTF-8"
                ) from error
            if not isinstance(row, dict):
                raise _refuse(
                    f"{source}, line {number}: holds a {type(row).__name__}",
                    fix='write one JSON object per line: {"file": "a.png", "text": "a crane"}',
                )
            yield _item(row, root, source.parent, where)


def _item(row: Mapping[str, Any], root: Path, folder: Path, where: _Where) -> FolderItem:
    """`root` is the resolved `folder`; paths of items stay as the caller wrote the folder."""
    values = {name: _string(row, name, where) for name in COLUMNS if name not in _LISTS}
    question, answer = values["question"], values["answer"]
    if bool(question) != bool(answer):
        absent = "answer" if question else "question"
        raise where.error(absent, "is empty, its counterpart is not", "give both question and answer")
    answers = _list(row, "answers", where)
    if answers and not answer:
        raise where.error("answer", "is empty, but there are answers", "give the best of them as answer")
    if not values["text"] and not question:
        raise where.error("text", "is empty", "describe the image, or take the row out")
    encoded = _string(row, "image", where)
    inline: bytes | None = None
    if encoded:
        if values["file"]:
            raise where.error("image", "the row has both file and image", "keep one of them")
        inline = _decode(encoded, where)
        path = Path(f"{where.file.name}#{where.line}")
    else:
        _inside(root, values["file"], where)
        path = folder / values["file"]
    return FolderItem(
        path=path,
        text=values["text"],
        label=values["label"],
        concept=values["concept"],
        split=values["split"],
        domain=values["domain"] or (where.file.stem if where.file.name != INDEX else root.name),
        source=values["source"],
        time=_time(values["time"], where),
        tags=_list(row, "tags", where),
        question=question,
        answer=answer,
        answers=answers,
        inline=inline,
    )


def _string(row: Mapping[str, Any], name: str, where: _Where) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise where.error(name, f"is a {type(value).__name__}", "write it as a string")
    return value.strip()


def _inside(root: Path, name: str, where: _Where, must_exist: bool = True) -> Path:
    """The file `name` under `root`, refused when it leads out of it."""
    if not name:
        raise where.error("file", "is empty", "name an image file, relative to the folder")
    # A backslash is a separator on Windows alone; refusing it keeps a dataset portable and its check simple.
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise where.error(
            "file", f"'{name}' leads out of the folder", "copy the image in; use a path like photos/a.png"
        )
    base = root.resolve()
    target = Path(os.path.realpath(base / name))
    if not target.is_relative_to(base):
        raise where.error("file", f"'{name}' is a link out of the folder", "copy the image into the folder")
    if must_exist and not target.is_file():
        raise where.error("file", f"'{name}' does not exist under {root}", "add the image, or drop the row")
    return target


def _decode(encoded: str, where: _Where) -> bytes:
    if encoded.startswith("data:"):
        head, comma, encoded = encoded.partition(",")
        if not comma or not head.endswith(";base64"):
            raise where.error("image", "is a data: URI, not in base64", "write data:image/png;base64,...")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise where.error("image", f"not base64 ({error})", "encode the image file as base64") from error


def _time(value: str, where: _Where) -> str:
    if not value:
        return ""
    try:
        moment = datetime.fromisoformat(value)
    except ValueError as error:
        raise where.error("time", f"'{value}' is no ISO 8601 time", "write 2026-01-31T12:00:00Z") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).astimezone(UTC).isoformat()


def _list(row: Mapping[str, Any], name: str, where: _Where) -> tuple[str, ...]:
    value = row.get(name)
    if value is None:
        return ()
    parts = value.split(TAG_SEPARATOR) if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise where.error(name, "is not a list of strings", 'write ["red", "round"], or "red;round"')
    return tuple(part.strip() for part in parts if part.strip())


def _cell(item: FolderItem, name: str) -> str:
    value = getattr(item, name)
    return TAG_SEPARATOR.join(part.replace(TAG_SEPARATOR, ",") for part in value) if name in _LISTS else str(value)


def _select(items: Iterator[FolderItem], index: Path, split: str | None) -> list[FolderItem]:
    if split is None:
        return list(items)
    seen: set[str] = set()
    chosen = []
    for item in items:
        seen.add(item.split)
        if item.split in ("", split):
            chosen.append(item)
    if not chosen:
        known = ", ".join(sorted(seen)) or "no rows"
        raise _refuse(
            f"{index} has nothing in split '{split}'; it has: {known}",
            fix="name one of these splits, or leave the split out",
        )
    return chosen
