"""VQAv2: a JSON file of questions, and one of annotations with ten answers to each.

The answer is ``multiple_choice_answer``, or what most people said; all answers are kept as ``answers``. Images are
named as VQAv2 has it, ``COCO_<data_subtype>_<image_id, 12 digits>.jpg``, or by the question's own ``image``; they are
found as those of COCO are. The two files belong together if their names differ in ``questions`` and ``annotations``
alone, or if there is one of each.

Memory: one element of a file; the questions are in a temporary file meanwhile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from core.errors import RecordError
from streams.datasets.json_files import ImageFinder, files_of_shape, shape_of
from streams.datasets.json_stream import DiskIndex, elements
from streams.datasets.mapping import ImageRef, items_of
from streams.datasets.source import Format, Source, split_of
from streams.folders import DatasetRow
from streams.row_files import Where, dataset_error

_NOISE = re.compile(r"openended|multiplechoice|questions?|annotations?|answers?|[^a-z0-9]")


def matches(path: Path) -> bool:
    """Whether a path is one of the two files, or a folder with one."""
    return bool(files_of_shape(path, "questions", "answers"))


def read(source: Source) -> Iterator[DatasetRow]:
    """A row for each annotation. Raises RecordError where one of the two files is missing."""
    for questions, answers in _file_pairs(source.path):
        yield from _answered(questions, answers, source.domain)


def _file_pairs(path: Path) -> list[tuple[Path, Path]]:
    folder = path if path.is_dir() else path.parent
    questions, answers = files_of_shape(folder, "questions"), files_of_shape(folder, "answers")
    if path.is_file():
        mine = questions if shape_of(path) == "questions" else answers
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
    finder = ImageFinder(questions)
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
                row, name = _row(annotation, by_id, subtype, where)
                image = ImageRef(finder.find(name, where))
                items = list(items_of(row, image, where, domain=domain, split=split_name))
            except RecordError as error:
                yield DatasetRow(str(where), error)
                continue
            for item in items:
                yield DatasetRow(str(where), item)


def _row(annotation: Any, questions: DiskIndex, subtype: str, where: Where) -> tuple[dict[str, Any], str]:
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


FORMAT: Final = Format("vqa", "VQAv2 questions and annotations beside their images", matches, read)
