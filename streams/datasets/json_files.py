"""What the formats of one large JSON file share: telling them apart, and finding the images that they name."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from core.errors import RecordError
from streams.datasets.json_stream import TOP, elements
from streams.row_files import Where, inside

Shape = Literal["coco", "questions", "answers", "conversations", ""]
MAX_FILES: Final = 64
"""JSON files of a folder that are looked into."""
MAX_ROOTS: Final = 64


def json_files(path: Path) -> list[Path]:
    """The file itself; of a folder those in it and in its ``annotations``."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" else []
    candidates = (file for folder in (path, path / "annotations") for file in sorted(folder.glob("*.json")))
    return list(islice(candidates, MAX_FILES))


def shape_of(path: Path) -> Shape:
    """What a JSON file holds, by the first element of its arrays; empty for something else, and for what is no JSON."""
    try:
        for array, value in elements(path, (TOP, "images", "annotations", "questions")):
            return _shape(array, value)
    except (RecordError, OSError):
        return ""
    return ""


def _shape(array: str, value: Any) -> Shape:
    if not isinstance(value, dict):
        return ""
    if array == TOP:
        return "conversations" if "conversations" in value else ""
    if array == "questions":
        return "questions" if "question" in value else ""
    if array == "annotations" and "question_id" in value:
        return "answers"
    return "coco" if "file_name" in value or "caption" in value else ""


def files_of_shape(path: Path, *shapes: Shape) -> list[Path]:
    """The JSON files of a path that hold one of the shapes."""
    return [file for file in json_files(path) if shape_of(file) in shapes]


class ImageFinder:
    """Finds images by name beside a JSON file: in its folder, a folder of that, ``images``, or the same beside
    ``annotations`` where the file is in there. Never above these.
    """

    def __init__(self, file: Path) -> None:
        home = file.parent
        above = [home.parent] if home.name == "annotations" else []
        self._roots = list(islice(_roots([*above, home]), MAX_ROOTS))

    def find(self, name: str, where: Where) -> Path:
        """The path of an image. Raises RecordError when it leads out of the folders, or is in none of them."""
        problem: RecordError | None = None
        for position, root in enumerate(self._roots):
            try:
                inside(root, name, where)
            except RecordError as error:
                problem = problem or error
                continue
            self._roots.insert(0, self._roots.pop(position))  # the next is most likely there as well
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
