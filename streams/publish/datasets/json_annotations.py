"""Formats of large JSON files next to their images: COCO captions, LLaVA's conversations, VQAv2.

**COCO captions**: a file of ``images`` and ``annotations``; each caption is a sample of its image. The images are next
to the file, in ``images`` or in a folder such as ``train2017``; where the file is in ``annotations``, next to that. Of
a folder with several such files, those whose names begin with ``captions`` are read.

**LLaVA**: an array, or JSON Lines, of ``{"image": ..., "conversations": [{"from", "value"}, ...]}``. Each question of a
person and the answer of the model to it is a sample of the image, without the ``<image>`` mark. The image is named
relative to the file's folder, a folder of that, or ``images``.

**VQAv2**: a file of questions, and one of annotations with ten answers to each. The answer is
``multiple_choice_answer``, or what most people said; all answers are kept as ``answers``. Images are named as VQAv2 has
it, ``COCO_<data_subtype>_<image_id, 12 digits>.jpg``, or by the question's own ``image``; they are found as those of
COCO are. The two files belong together if their names differ in ``questions`` and ``annotations`` alone, or if there is
one of each.

Memory: one element of a file. What one file of two, or one array of two, has to be looked up in the other is in a
temporary file meanwhile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from core.errors import RecordError
from streams.publish.datasets.json_stream import TOP, DiskIndex, elements
from streams.publish.datasets.mapping import ImageRef, items_of
from streams.publish.datasets.source import Format, Source, split_of
from streams.publish.folders import DatasetRow, FolderItem
from streams.publish.row_files import Where, dataset_error, inside, jsonl_rows

_Shape = Literal["coco", "questions", "answers", "conversations", ""]
_MAX_FILES: Final = 64
"""JSON files of a folder that are looked into."""
_MAX_ROOTS: Final = 64


def _json_files(path: Path) -> list[Path]:
    """The file itself; of a folder those in it and in its ``annotations``."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" else []
    candidates = (file for folder in (path, path / "annotations") for file in sorted(folder.glob("*.json")))
    return list(islice(candidates, _MAX_FILES))


def _shape_of(path: Path) -> _Shape:
    """What a JSON file holds, by the first element of its arrays; empty for something else, and for what is no JSON."""
    try:
        for array, value in elements(path, (TOP, "images", "annotations", "questions")):
            return _shape(array, value)
    except (RecordError, OSError):
        return ""
    return ""


def _shape(array: str, value: Any) -> _Shape:
    if not isinstance(value, dict):
        return ""
    if array == TOP:
        return "conversations" if "conversations" in value else ""
    if array == "questions":
        return "questions" if "question" in value else ""
    if array == "annotations" and "question_id" in value:
        return "answers"
    return "coco" if "file_name" in value or "caption" in value else ""


def _files_of_shape(path: Path, *shapes: _Shape) -> list[Path]:
    """The JSON files of a path that hold one of the shapes."""
    return [file for file in _json_files(path) if _shape_of(file) in shapes]


class _ImageFinder:
    """Finds images by name beside a JSON file: in its folder, a folder of that, ``images``, or the same beside
    ``annotations`` where the file is in there. Never above these.
    """

    def __init__(self, file: Path) -> None:
        home = file.parent
        above = [home.parent] if home.name == "annotations" else []
        self._roots = list(islice(_roots([*above, home]), _MAX_ROOTS))

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


def _is_coco(path: Path) -> bool:
    """Whether a path is such a file, or a folder with one."""
    return bool(_files_of_shape(path, "coco"))


def _read_coco(source: Source) -> Iterator[DatasetRow]:
    """A row for each caption, in the order of the annotations."""
    files = _files_of_shape(source.path, "coco")
    if not files:
        raise dataset_error(f"{source.path} has no JSON with images and annotations", "name the captions_*.json file")
    for file in [each for each in files if each.name.startswith("captions")] or files:
        yield from _captions(file, source.domain)


def _captions(file: Path, domain: str) -> Iterator[DatasetRow]:
    finder = _ImageFinder(file)
    split = split_of(file.stem)
    with DiskIndex() as names:
        for _, image in elements(file, ("images",)):
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                names.put(image.get("id"), image["file_name"])
        for number, (_, annotation) in enumerate(elements(file, ("annotations",)), start=1):
            where = Where(file, f"annotation {number}")
            try:
                yield DatasetRow(str(where), _caption(annotation, names, finder, where, domain, split))
            except RecordError as error:
                yield DatasetRow(str(where), error)


def _caption(
    annotation: Any, names: DiskIndex, finder: _ImageFinder, where: Where, domain: str, split: str
) -> FolderItem:
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


COCO: Final = Format("coco", "COCO captions JSON beside its images", _is_coco, _read_coco)


_LINES: Final = (".jsonl", ".ndjson")


def _is_llava(path: Path) -> bool:
    """Whether a path is such a file, or a folder with one."""
    return bool(_conversation_files(path))


def _read_llava(source: Source) -> Iterator[DatasetRow]:
    """A row for each turn. Raises RecordError where there is no such file."""
    files = _conversation_files(source.path)
    if not files:
        raise dataset_error(f"{source.path} has no JSON with conversations", "name the JSON file itself")
    for file in files:
        yield from _conversations(file, source.domain)


def _conversation_files(path: Path) -> list[Path]:
    if path.suffix.lower() not in _LINES or not path.is_file():
        return _files_of_shape(path, "conversations")
    try:
        rows = [row for _, row in islice(jsonl_rows(path), 1)]
    except (RecordError, OSError):
        return []
    return [path] if rows and not isinstance(rows[0], RecordError) and "conversations" in rows[0] else []


def _conversations(file: Path, domain: str) -> Iterator[DatasetRow]:
    finder = _ImageFinder(file)
    split = split_of(file.stem)
    for where, row in jsonl_rows(file) if file.suffix.lower() in _LINES else _elements(file):
        try:
            columns = _turns(row, where)
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


def _turns(row: Any, where: Where) -> dict[str, Any]:
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


LLAVA: Final = Format("llava", "LLaVA conversations JSON beside its images", _is_llava, _read_llava)


_NOISE = re.compile(r"openended|multiplechoice|questions?|annotations?|answers?|[^a-z0-9]")


def _is_vqa(path: Path) -> bool:
    """Whether a path is one of the two files, or a folder with one."""
    return bool(_files_of_shape(path, "questions", "answers"))


def _read_vqa(source: Source) -> Iterator[DatasetRow]:
    """A row for each annotation. Raises RecordError where one of the two files is missing."""
    for questions, answers in _file_pairs(source.path):
        yield from _answered(questions, answers, source.domain)


def _file_pairs(path: Path) -> list[tuple[Path, Path]]:
    folder = path if path.is_dir() else path.parent
    questions, answers = _files_of_shape(folder, "questions"), _files_of_shape(folder, "answers")
    if path.is_file():
        mine = questions if _shape_of(path) == "questions" else answers
        mine[:] = [path]
    pairs = [(one, other) for one in questions for other in answers if _stem(one) == _stem(other)]
    if not pairs and len(questions) == len(answers) == 1:
        pairs = [(questions[0], answers[0])]
    if not pairs:
        problem = (
            f"{path} is half of a VQA data set: {len(questions)} files of questions, {len(answers)} of answers fit"
        )
        raise dataset_error(problem, "put *_questions.json and *_annotations.json of one split into one folder")
    return pairs


def _stem(path: Path) -> str:
    return _NOISE.sub("", path.stem.lower())


def _answered(questions: Path, answers: Path, domain: str) -> Iterator[DatasetRow]:
    finder = _ImageFinder(questions)
    subtype = split_name = ""
    with DiskIndex() as by_id:
        for array, question in elements(questions, ("questions", "data_subtype")):
            if array == "data_subtype":
                subtype = str(question)
            elif isinstance(question, dict):
                by_id.put(question.get("question_id"), json.dumps(question))
        split_name = split_of(subtype) or split_of(questions.stem)
        for number, (_, annotation) in enumerate(elements(answers, ("annotations",)), start=1):
            where = Where(answers, f"annotation {number}")
            try:
                row, name = _answer(annotation, by_id, subtype, where)
                image = ImageRef(finder.find(name, where))
                items = list(items_of(row, image, where, domain=domain, split=split_name))
            except RecordError as error:
                yield DatasetRow(str(where), error)
                continue
            for item in items:
                yield DatasetRow(str(where), item)


def _answer(annotation: Any, questions: DiskIndex, subtype: str, where: Where) -> tuple[dict[str, Any], str]:
    """Columns of a sample, and the name of its image."""
    if not isinstance(annotation, dict):
        raise where.row_error("is no object", "write {question_id, answers}")
    known = questions.get(annotation.get("question_id"))
    if known is None:
        problem = f"{annotation.get('question_id')!r} is none of the questions"
        raise where.error("question_id", problem[:200], "add the question, or take the answers out")
    question = json.loads(known)
    row = {
        "question": question.get("question"),
        "answer": annotation.get("multiple_choice_answer", annotation.get("answer")),
        "answers": annotation.get("answers"),
        "label": annotation.get("answer_type"),
    }
    image = question.get("image")
    if isinstance(image, str):
        return row, image
    number = question.get("image_id", annotation.get("image_id"))
    if not isinstance(number, int) or not subtype:
        raise where.error("image_id", "names no image", "give image_id and data_subtype, or `image` in the question")
    return row, f"COCO_{subtype}_{number:012d}.jpg"


VQA: Final = Format("vqa", "VQAv2 questions and annotations beside their images", _is_vqa, _read_vqa)
