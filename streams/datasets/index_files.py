"""Ratchet's own formats: the folder dataset (:mod:`streams.folders`), and single CSV and JSON Lines files of its
columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from streams.datasets.source import Format, Source
from streams.folders import INDEX, DatasetRow, read_index
from streams.row_files import dataset_error


def read(source: Source) -> Iterator[DatasetRow]:
    """Rows of ``data.csv`` of a folder, or of the file itself."""
    index = source.path / INDEX if source.path.is_dir() else source.path
    if not index.is_file():
        raise dataset_error(f"{source.path} has no {INDEX}", f"name a folder with images and a {INDEX}: file,text")
    return read_index(index)


def _is_folder(path: Path) -> bool:
    return (path / INDEX).is_file()


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv" and path.is_file()


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() in (".jsonl", ".ndjson") and path.is_file()


FOLDER: Final = Format("folder", "a folder of images with data.csv", _is_folder, read)
CSV: Final = Format("csv", "a CSV file with the columns of data.csv", _is_csv, read)
JSONL: Final = Format("jsonl", "a JSON Lines file with the fields of data.csv", _is_jsonl, read)
