"""COCO captions: a JSON file of ``images`` and ``annotations``; each caption is a sample of its image.

The images are beside the file, in ``images`` or in a folder such as ``train2017``; where the file is in
``annotations``, beside that. Of a folder with several such files, those whose names begin with ``captions`` are read.

Memory: one element of the file. It is read twice, and the names of its images are kept in a temporary file meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from core.errors import RecordError
from streams.datasets.json_files import ImageFinder, files_of_shape
from streams.datasets.json_stream import DiskIndex, elements
from streams.datasets.source import Format, Source, split_of
from streams.folders import DatasetRow, FolderItem
from streams.row_files import Where, dataset_error


def matches(path: Path) -> bool:
    """Whether a path is such a file, or a folder with one."""
    return bool(files_of_shape(path, "coco"))


def read(source: Source) -> Iterator[DatasetRow]:
    """A row for each caption, in the order of the annotations."""
    files = files_of_shape(source.path, "coco")
    if not files:
        raise dataset_error(f"{source.path} has no JSON with images and annotations", "name the captions_*.json file")
    for file in [each for each in files if each.name.startswith("captions")] or files:
        yield from _captions(file, source.domain)


def _captions(file: Path, domain: str) -> Iterator[DatasetRow]:
    finder = ImageFinder(file)
    split = split_of(file.stem)
    with DiskIndex() as names:
        for _, image in elements(file, ("images",)):
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                names.put(image.get("id"), image["file_name"])
        for number, (_, annotation) in enumerate(elements(file, ("annotations",)), start=1):
            where = Where(file, f"annotation {number}")
            try:
                yield DatasetRow(str(where), _item(annotation, names, finder, where, domain, split))
            except RecordError as error:
                yield DatasetRow(str(where), error)


def _item(annotation: Any, names: DiskIndex, finder: ImageFinder, where: Where, domain: str, split: str) -> FolderItem:
    if not isinstance(annotation, dict):
        raise where.row_error("is no object", "write {image_id, caption}")
    caption = annotation.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise where.error("caption", "there is none", "name the captions file; boxes and key points have no texts")
    name = names.get(annotation.get("image_id"))
    if name is None:
        problem = f"{annotation.get('image_id')!r} is none of the images of the file"
        raise where.error("image_id", problem[:200], "add it to `images`, or take the caption out")
    return FolderItem(finder.find(name, where), caption.strip(), split=split, domain=domain)


FORMAT: Final = Format("coco", "COCO captions JSON beside its images", matches, read)
