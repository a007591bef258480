"""Image files with a text file of the same name beside each (``0001.jpg``, ``0001.txt``, ``0001.json``).

What img2dataset writes with ``output_format=files``, and what many captioning tools leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from core.errors import RecordError
from streams.datasets.imagefolder import images_under
from streams.datasets.mapping import ImageRef, items_of
from streams.datasets.shards import values_of
from streams.datasets.source import MAX_TEXT_BYTES, Format, Source, split_of
from streams.folders import DatasetRow
from streams.row_files import Where, inside

LOOKED_AT: Final = 16
"""Images whose texts are looked for, to tell what a folder is."""


def matches(path: Path) -> bool:
    """Whether one of the first images of a folder has a text beside it."""
    return path.is_dir() and any(image.with_suffix(".txt").is_file() for image in islice(images_under(path), LOOKED_AT))


def read(source: Source) -> Iterator[DatasetRow]:
    """Each image with the words beside it."""
    for image in images_under(source.path):
        where = Where(image, "the file")
        try:
            inside(source.path, image.relative_to(source.path).as_posix(), where)
            parts = {suffix: text for suffix in ("txt", "json") if (text := _beside(image, suffix, where)) is not None}
            split = split_of(image.parent.name)
            row = values_of(parts, where)
            items = list(items_of(row, ImageRef(image), where, domain=source.domain, split=split))
        except RecordError as error:
            yield DatasetRow(str(image), error)
            continue
        for item in items:
            yield DatasetRow(str(image), item)


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


FORMAT: Final = Format("sidecars", "image files with a .txt beside each (img2dataset files)", matches, read)
