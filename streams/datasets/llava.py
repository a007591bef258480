"""LLaVA's conversations, as JSON (an array) or JSON Lines: ``{"image": ..., "conversations": [{"from", "value"},
...]}``.

Each question of a person and the answer of the model to it is a sample of the image, without the ``<image>`` mark. The
image is named relative to the file's folder, a folder of that, or ``images``.

Memory: one element of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from core.errors import RecordError
from streams.datasets.json_files import ImageFinder, files_of_shape
from streams.datasets.json_stream import TOP, elements
from streams.datasets.mapping import ImageRef, items_of
from streams.datasets.source import Format, Source, split_of
from streams.folders import DatasetRow
from streams.row_files import Where, dataset_error, jsonl_rows

LINES: Final = (".jsonl", ".ndjson")


def matches(path: Path) -> bool:
    """Whether a path is such a file, or a folder with one."""
    return bool(_files(path))


def read(source: Source) -> Iterator[DatasetRow]:
    """A row for each turn. Raises RecordError where there is no such file."""
    files = _files(source.path)
    if not files:
        raise dataset_error(f"{source.path} has no JSON with conversations", "name the JSON file itself")
    for file in files:
        yield from _conversations(file, source.domain)


def _files(path: Path) -> list[Path]:
    if path.suffix.lower() not in LINES or not path.is_file():
        return files_of_shape(path, "conversations")
    try:
        rows = [row for _, row in islice(jsonl_rows(path), 1)]
    except (RecordError, OSError):
        return []
    return [path] if rows and not isinstance(rows[0], RecordError) and "conversations" in rows[0] else []


def _conversations(file: Path, domain: str) -> Iterator[DatasetRow]:
    finder = ImageFinder(file)
    split = split_of(file.stem)
    for where, row in jsonl_rows(file) if file.suffix.lower() in LINES else _elements(file):
        try:
            columns = _columns(row, where)
            image = ImageRef(finder.find(columns.pop("image"), where))
            items = list(items_of(columns, image, where, domain=domain, split=split))
        except RecordError as error:
            yield DatasetRow(str(where), error)
            continue
        for item in items:
            yield DatasetRow(str(where), item)


def _elements(file: Path) -> Iterator[tuple[Where, Any]]:
    for number, (_, row) in enumerate(elements(file, (TOP,)), start=1):
        yield Where(file, f"element {number}"), row


def _columns(row: Any, where: Where) -> dict[str, Any]:
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, dict) or not row.get("conversations"):
        raise where.error("conversations", "there is none", "give a human and a gpt turn")
    image = row.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not isinstance(image, str) or not image:
        raise where.error("image", "there is none, or more than one", "leave texts without an image out (--skip-bad)")
    return {"image": image, "conversations": row["conversations"]}


FORMAT: Final = Format("llava", "LLaVA conversations JSON beside its images", matches, read)
