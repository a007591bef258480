"""Large JSON files next to their images: COCO captions and LLaVA conversations.

**COCO captions**: each caption is a sample. Images are next to the file, in ``images`` or in a folder such as
``train2017``; for a file in ``annotations``, next to that folder. Of several such files, those whose names begin with
``captions`` are read.

**LLaVA**: an array, or JSON Lines. Each question with its answer is a sample, without the ``<image>`` mark. Images are
named relative to the file's folder, a subfolder, or ``images``. Memory: one element of a file, and the image names
(COCO).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal

import ijson

from core.errors import RecordError
from streams.publish.datasets.mapping import Format, ImageRef, Source, items_of, rows_of, split_of
from streams.publish.folders import JSON_LINES, DatasetRow, FolderItem, Where, dataset_error, inside, jsonl_rows

_Shape = Literal["coco", "conversations", ""]
_MAX_FILES: Final = 64
_MAX_ROOTS: Final = 64
_HEAD_BYTES: Final = 64 * 1024

MAX_ELEMENT_BYTES: Final = 16 * 2**20
"""Longest element of an array, and longest text in skipped parts."""
MAX_DEPTH: Final = 32
_CLOSE: Final = ("end_map", "end_array")


@dataclass
class _Bounded:
    path: Path
    stream: BinaryIO
    size: int = 0
    """Bytes read of the current element."""

    def read(self, size: int) -> bytes:
        self.size += size
        if self.size > MAX_ELEMENT_BYTES + size:
            raise dataset_error(f"{self.path} has an element of more than {MAX_ELEMENT_BYTES} bytes", "take it out")
        return self.stream.read(size)


def elements(path: Path, array: str = "") -> Iterator[Any]:
    """Yield the elements of an array in a JSON document: the top-level one named ``array``, or the document itself.
    Raises RecordError if the file is not JSON, or has an element that is too large or too deep."""
    number = 0
    try:
        with path.open("rb") as stream:
            for element in _elements(_Bounded(path, stream), array):
                number += 1
                yield element
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
        problem = f"{path}, after element {number}: not JSON ({str(error).strip()[:160]})"
        raise dataset_error(problem, "write it again, or copy it again") from error


def _elements(file: _Bounded, array: str) -> Iterator[Any]:
    depth, key = 0, ""  # `key`: the last top-level name
    inside = -1  # depth of the array's elements; -1 while it is not open
    builder: ijson.ObjectBuilder | None = None
    # Not `ijson.items`: it builds a path for each event, at a cost quadratic in the depth.
    for event, value in ijson.basic_parse(file, use_float=True):
        if builder is None:
            file.size = 0
        depth -= event in _CLOSE
        if builder is not None:
            builder.event(event, value)
        elif event == "map_key":
            key = value if depth == 1 else key
        elif event in _CLOSE:
            inside = -1 if depth < inside else inside
        elif depth == inside:
            builder = ijson.ObjectBuilder()
            builder.event(event, value)
        elif event == "start_array" and depth == bool(array) and key == array:
            inside = depth + 1
        depth += event in ("start_map", "start_array")
        if depth > MAX_DEPTH:
            raise dataset_error(f"{file.path} is nested deeper than {MAX_DEPTH}", "flatten it")
        if builder is not None and depth == inside:
            yield builder.value
            builder = None


def _shape_of(path: Path) -> _Shape:
    """Detect the kind of a JSON file by the names in its first bytes; empty for other kinds."""
    try:
        with path.open("rb") as stream:
            head = stream.read(_HEAD_BYTES).decode(errors="replace").lstrip("\ufeff \t\r\n")
    except OSError:
        return ""
    names = set(re.findall(r'"(\w+)"\s*:', head))
    if head.startswith("["):
        return "conversations" if "conversations" in names else ""
    return "coco" if names & {"images", "annotations"} and names & {"file_name", "caption"} else ""


def _files_of_shape(path: Path, shape: _Shape) -> list[Path]:
    candidates = iter([path] if path.suffix.lower() == ".json" else [])
    if path.is_dir():
        candidates = (file for folder in (path, path / "annotations") for file in sorted(folder.glob("*.json")))
    return [file for file in islice(candidates, _MAX_FILES) if _shape_of(file) == shape]


class _ImageFinder:
    """Finds images by name in a JSON file's folder, its subfolders or ``images``; for a file in ``annotations`` also
    next to that folder. Never above these."""

    def __init__(self, file: Path) -> None:
        home = file.parent
        above = [home.parent] if home.name == "annotations" else []
        self._roots = list(islice(_roots([*above, home]), _MAX_ROOTS))

    def find(self, name: str, where: Where) -> Path:
        """The path of an image. Raises RecordError if it leads out of the folders, or is in none of them."""
        problem: RecordError | None = None
        for position, root in enumerate(self._roots):
            try:
                inside(root, name, where)
            except RecordError as error:
                problem = problem or error
                continue
            self._roots.insert(0, self._roots.pop(position))  # the next image is most likely there too
            return root / name
        assert problem is not None
        raise problem


def _roots(homes: list[Path]) -> Iterator[Path]:
    for home in homes:
        images = home / "images"
        for folder in (home, images):
            if folder.is_dir():
                yield folder
                yield from sorted(child for child in folder.iterdir() if child.is_dir() and child != images)


# -- COCO ---------------------------------------------------------------------------------------------------------


def _read_coco(source: Source) -> Iterator[DatasetRow]:
    files = _files_of_shape(source.path, "coco")
    if not files:
        raise dataset_error(f"{source.path} has no JSON with images and annotations", "name the captions_*.json file")
    for file in [each for each in files if each.name.startswith("captions")] or files:
        finder, split = _ImageFinder(file), split_of(file.stem)
        images = (each for each in elements(file, "images") if isinstance(each, dict))
        names = {str(each.get("id")): each.get("file_name") for each in images}
        for number, annotation in enumerate(elements(file, "annotations"), start=1):
            where = Where(file, f"annotation {number}")
            yield from rows_of(where, _caption(annotation, names, finder, where, source.domain, split))


def _caption(
    annotation: Any, names: dict[str, Any], finder: _ImageFinder, where: Where, domain: str, split: str
) -> Iterator[FolderItem]:
    if not isinstance(annotation, dict):
        raise where.row_error("is not an object", "write {image_id, caption}")
    caption = annotation.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise where.error("caption", "there is none", "name the captions file; boxes and key points have no texts")
    name = names.get(str(annotation.get("image_id")))
    if not isinstance(name, str):
        problem = f"{annotation.get('image_id')!r} is none of the images of the file"
        raise where.error("image_id", problem[:200], "add it to `images`, or take the caption out")
    yield FolderItem(finder.find(name, where), caption.strip(), split=split, domain=domain)


COCO: Final = Format(
    "coco", "COCO captions JSON next to its images", lambda path: bool(_files_of_shape(path, "coco")), _read_coco
)


# -- LLaVA --------------------------------------------------------------------------------------------------------


def _read_llava(source: Source) -> Iterator[DatasetRow]:
    files = _conversation_files(source.path)
    if not files:
        raise dataset_error(f"{source.path} has no JSON with conversations", "name the JSON file itself")
    for file in files:
        finder, split = _ImageFinder(file), split_of(file.stem)
        lines = file.suffix.lower() in JSON_LINES
        numbered = ((Where(file, f"element {number}"), row) for number, row in enumerate(elements(file), start=1))
        for where, row in jsonl_rows(file) if lines else numbered:
            yield from rows_of(where, _turns(row, finder, where, source.domain, split))


def _conversation_files(path: Path) -> list[Path]:
    if path.suffix.lower() not in JSON_LINES or not path.is_file():
        return _files_of_shape(path, "conversations")
    try:
        first = next((row for _, row in jsonl_rows(path)), None)
    except (RecordError, OSError):
        return []
    return [path] if isinstance(first, dict) and "conversations" in first else []


def _turns(row: Any, finder: _ImageFinder, where: Where, domain: str, split: str) -> Iterator[FolderItem]:
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, dict) or not row.get("conversations"):
        raise where.error("conversations", "there is none", "give a human and a gpt turn")
    image = row.get("image")
    if isinstance(image, list) and len(image) == 1:
        image = image[0]
    if not isinstance(image, str) or not image:
        raise where.error("image", "there is none, or more than one", "leave texts without an image out (--skip-bad)")
    found = ImageRef(finder.find(image, where))
    yield from items_of({"conversations": row["conversations"]}, found, where, domain=domain, split=split)


LLAVA: Final = Format(
    "llava", "LLaVA conversations JSON next to its images", lambda path: bool(_conversation_files(path)), _read_llava
)
