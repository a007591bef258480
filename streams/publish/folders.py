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

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from core.errors import RecordError
from core.files import replacing
from streams.publish.row_files import (
    MAX_IMAGE_BYTES,
    TAG_SEPARATOR,
    Where,
    csv_rows,
    dataset_error,
    decode_base64,
    inside,
    iso_time,
    jsonl_rows,
    list_field,
    text_field,
)

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
MAX_SPLITS_SHOWN: Final = 20


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
    """One row of a data set: what it holds, or why it cannot be used."""

    place: str
    """File and row, as messages name it."""
    content: FolderItem | RecordError

    def __post_init__(self) -> None:
        # The frames of an error hold the row and the error itself: a cycle, with an image in it, for each bad row.
        if isinstance(self.content, RecordError):
            self.content.__traceback__ = self.content.__cause__ = self.content.__context__ = None


def read_folder(path: Path | str, split: str | None = None) -> list[FolderItem]:
    """The rows of the folder dataset at `path`, in file order; with `split`, only those that belong to it.

    Raises `RecordError` naming file, line, field and fix at the first row that is wrong, and when
    nothing belongs to `split`.
    """
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
    """Rows of a `.csv` or `.jsonl` file with the columns of a folder dataset, one at a time.

    Raises `RecordError` when the file holds no such table.
    """
    root, folder = index.parent.resolve(), index.parent
    table = jsonl_rows(index) if index.suffix.lower() in (".jsonl", ".ndjson") else csv_rows(index, _header_of(index))
    for where, row in table:
        try:
            content = row if isinstance(row, RecordError) else _item(row, root, folder, where)
        except RecordError as error:
            content = error
        yield DatasetRow(str(where), content)


def select_split(rows: Iterable[DatasetRow], source: Path, split: str | None) -> Iterator[DatasetRow]:
    """The rows that belong to `split` (all where it is None), and those that are wrong.

    Raises `RecordError` at the end when there was nothing of `split`.
    """
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
    """Write `items` as the folder dataset at `path`, and return `path`.

    An item's path is inside `path`, or relative to it. Images held inline are written there; others must be
    in place already. `data.csv` appears last and atomically; same items, same bytes.
    """
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


def _header_of(index: Path) -> Callable[[Sequence[str]], None]:
    return lambda names: _check_header(names, index)


def _check_header(names: Iterable[str], index: Path) -> None:
    header = list(names)
    missing = [name for name in ("text",) if name not in header]
    if "file" not in header and "image" not in header:
        missing.insert(0, "file")
    if missing:
        only_one = len(header) == 1 and any(mark in header[0] for mark in ";\t|")
        raise dataset_error(
            f"{index}, line 1, field '{missing[0]}': no such column; the header has {header or 'nothing'}",
            fix="separate the columns by commas" if only_one else "the first line must be: file,text",
        )


def _item(row: Mapping[str, Any], root: Path, folder: Path, where: Where) -> FolderItem:
    """`root` is the resolved `folder`; paths of items stay as the caller wrote the folder."""
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
    return FolderItem(
        path=path,
        text=values["text"],
        label=values["label"],
        concept=values["concept"],
        split=values["split"],
        domain=values["domain"] or (where.file.stem if where.file.name != INDEX else root.name),
        source=values["source"],
        time=iso_time(values["time"], where),
        tags=list_field(row, "tags", where),
        question=question,
        answer=answer,
        answers=answers,
        inline=inline,
    )


def _cell(item: FolderItem, name: str) -> str:
    value = getattr(item, name)
    return TAG_SEPARATOR.join(part.replace(TAG_SEPARATOR, ",") for part in value) if name in _LISTS else str(value)
