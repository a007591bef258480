"""Readers of common data sets: :func:`detect` finds the format, :func:`read_dataset` yields the rows, in constant
memory. Ratchet's own formats are here: the folder dataset (:mod:`streams.publish.folders`), and CSV and JSON Lines
files with its columns."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final

from ratchet_client.images import MAX_BYTES
from streams.publish.datasets import imagefolder, json_annotations, parquet, shards
from streams.publish.datasets.mapping import Format, Source
from streams.publish.folders import INDEX, JSON_LINES, DatasetRow, dataset_error, read_index, select_split


def _read_index_file(source: Source) -> Iterator[DatasetRow]:
    index = source.path / INDEX if source.path.is_dir() else source.path
    if not index.is_file():
        raise dataset_error(f"{source.path} has no {INDEX}", f"name a folder with images and a {INDEX}: file,text")
    return read_index(index)


def _is_file(suffixes: Collection[str]) -> Callable[[Path], bool]:
    return lambda path: path.suffix.lower() in suffixes and path.is_file()


FOLDER: Final = Format(
    "folder", "a folder of images with data.csv", lambda path: (path / INDEX).is_file(), _read_index_file
)
CSV: Final = Format("csv", "a CSV file with the columns of data.csv", _is_file((".csv",)), _read_index_file)
JSONL: Final = Format("jsonl", "a JSON Lines file with the fields of data.csv", _is_file(JSON_LINES), _read_index_file)
FORMATS: Final[dict[str, Format]] = {
    each.name: each
    for each in (
        FOLDER, shards.FORMAT, parquet.FORMAT, CSV, json_annotations.LLAVA, JSONL, json_annotations.COCO,
        imagefolder.SIDECARS, imagefolder.FORMAT,
    )
}  # fmt: skip
"""Formats by name, in detection order: those with an index before those recognized by images."""


def detect(path: Path | str) -> Format:
    """Detect the format of a data set. Raises RecordError if it is unknown."""
    source = Path(path)
    _check_exists(source)
    for candidate in FORMATS.values():
        if candidate.matches(source):
            return candidate
    known = "; ".join(f"{each.name} ({each.holds})" for each in FORMATS.values())
    raise dataset_error(f"{source} is not a known data set", f"name one of: {known}")


def read_dataset(
    path: Path | str, format: str | None = None, split: str | None = None, max_image_bytes: int = MAX_BYTES
) -> Iterator[DatasetRow]:
    """Yield the rows of a data set in a stable order, bad rows with their errors. ``path``: a file, a folder, or a
    pattern of shards (``shards/{000..010}.tar``). ``format``: a name of :data:`FORMATS`; None: detected. ``split``:
    only its rows, and those without one. A larger image than ``max_image_bytes`` is an error of its row. Raises
    RecordError at once if the path is not a data set; later, if it cannot be read further."""
    chosen = choose(path, format)
    source = Source(Path(path), max_image_bytes)
    return select_split(chosen.read(source), source.path, split)


def choose(path: Path | str, name: str | None) -> Format:
    if name is None:
        return detect(path)
    if name not in FORMATS:
        raise dataset_error(f"{name!r} is not a known format", f"name one of: {', '.join(FORMATS)}")
    _check_exists(Path(path))
    return FORMATS[name]


def _check_exists(path: Path) -> None:
    if not path.exists() and "{" not in path.name:
        raise dataset_error(f"{path} does not exist", "name a file or a folder")
