"""Folders of images: with a ``metadata.csv`` or ``metadata.jsonl`` (Hugging Face's imagefolder), with a folder per
class, or with a text file next to each image. Memory: the names in one folder.

Metadata files are in the folder or its split folders (``train/metadata.csv``). Rows name their image in ``file_name``,
relative to the metadata file. Without metadata the class is the first folder (below ``train``, ``test``, ... if those
are splits), as in torchvision's ``ImageFolder``, and its name is also the text. Text files with the image's name
(``0001.txt``, ``0001.json``) are what img2dataset writes with ``output_format=files``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from core.errors import RecordError
from streams.publish.datasets.mapping import (
    IMAGE_SUFFIXES,
    MAX_TEXT_BYTES,
    Format,
    ImageRef,
    Source,
    has_words,
    items_of,
    rows_of,
    split_of,
)
from streams.publish.datasets.shards import values_of
from streams.publish.folders import DatasetRow, FolderItem, Where, dataset_error, inside, table_rows

METADATA: Final = ("metadata.csv", "metadata.jsonl")
FILE: Final = ("file_name", "file", "image")
MAX_DEPTH: Final = 16


def matches(path: Path) -> bool:
    if not path.is_dir():
        return False
    return bool(_metadata_files(path)) or any(image.parent != path for image in images_under(path))


def read(source: Source) -> Iterator[DatasetRow]:
    indexes = _metadata_files(source.path)
    if not indexes:
        yield from _classes(source)
    for index in indexes:
        yield from read_metadata(index, source)


def images_under(root: Path) -> Iterator[Path]:
    """Image files under ``root``, sorted; symbolic links to folders are not followed."""
    for folder, children, names in os.walk(root):
        children.sort()
        if len(Path(folder).relative_to(root).parts) >= MAX_DEPTH:
            children.clear()
        children[:] = [name for name in children if not name.startswith(".")]
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
                yield Path(folder) / name


def _metadata_files(root: Path) -> list[Path]:
    for folders in ([root], sorted(child for child in root.iterdir() if child.is_dir())):
        files = [folder / name for folder in folders for name in METADATA if (folder / name).is_file()]
        if files:
            return files
    return []


def read_metadata(index: Path, source: Source, root: Path | None = None) -> Iterator[DatasetRow]:
    """Rows of a metadata file, ``.csv`` or ``.jsonl``, with file names relative to ``root`` (default: its folder).
    Raises RecordError if it has no columns for an image and its text or class."""
    folder = root or index.parent

    def check(header: Sequence[str]) -> None:
        names = [name.lower() for name in header]
        if not set(names) & set(FILE) or not has_words(names):
            fix = "the first line must name file_name, and text, caption or label (or question and answer)"
            raise dataset_error(f"{index}, line 1: the columns are {list(header)[:40]}", fix)

    split = split_of(index.parent.name)
    for where, row in table_rows(index, check):
        yield from rows_of(where, _metadata_items(row, folder, where, source.domain, split))


def _metadata_items(
    row: Mapping[str, Any] | RecordError, folder: Path, where: Where, domain: str, split: str
) -> Iterator[FolderItem]:
    if isinstance(row, RecordError):
        raise row
    name = next((row[name] for name in FILE if row.get(name)), None)
    if not isinstance(name, str):
        raise where.error(FILE[0], "is missing", "name an image file, relative to the metadata")
    inside(folder, name, where)
    yield from items_of(row, ImageRef(folder / name), where, domain=domain, split=split)


def _classes(source: Source) -> Iterator[DatasetRow]:
    root = source.path
    for image in images_under(root):
        parts = image.relative_to(root).parts
        split = split_of(parts[0]) if len(parts) > 2 and split_of(parts[0]) == parts[0].lower() else ""
        yield from rows_of(Where(image, "the file"), _class_items(image, root, parts, split, source.domain))


def _class_items(image: Path, root: Path, parts: Sequence[str], split: str, domain: str) -> Iterator[FolderItem]:
    where = Where(image, "the file")
    if len(parts) < 2:
        raise where.row_error("is in no class folder", "move it to a folder named after its class")
    inside(root, image.relative_to(root).as_posix(), where)
    label = parts[1] if split else parts[0]
    yield FolderItem(image, label.replace("_", " "), label, split=split, domain=domain)


FORMAT: Final = Format("imagefolder", "image files with metadata.csv or .jsonl, or a folder a class", matches, read)


_LOOKED_AT: Final = 16


def _is_sidecars(path: Path) -> bool:
    return path.is_dir() and any(
        image.with_suffix(".txt").is_file() for image in islice(images_under(path), _LOOKED_AT)
    )


def _read_sidecars(source: Source) -> Iterator[DatasetRow]:
    for image in images_under(source.path):
        where = Where(image, "the file")
        yield from rows_of(where, _sidecar_items(image, source, where))


def _sidecar_items(image: Path, source: Source, where: Where) -> Iterator[FolderItem]:
    inside(source.path, image.relative_to(source.path).as_posix(), where)
    parts = {suffix: text for suffix in ("txt", "json") if (text := _beside(image, suffix, where)) is not None}
    split = split_of(image.parent.name)
    yield from items_of(values_of(parts, where), ImageRef(image), where, domain=source.domain, split=split)


def _beside(image: Path, suffix: str, where: Where) -> bytes | None:
    path = image.with_suffix(f".{suffix}")
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_TEXT_BYTES + 1)
    except OSError:
        return None
    if len(content) > MAX_TEXT_BYTES:
        raise where.error(suffix, f"more than {MAX_TEXT_BYTES} bytes", "shorten it")
    return content


SIDECARS: Final = Format(
    "sidecars", "image files with a .txt next to each (img2dataset files)", _is_sidecars, _read_sidecars
)
