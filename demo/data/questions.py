"""Question-answer datasets from the demo domains: folder datasets with columns question, answer and answers.

    >>> folder = prepare_questions("vqa_base", Path(".ratchet"))
    >>> items = [item for item in read_folder(folder, "test") if item.label == "colour"]

A row's label is the kind of question: `name`, `colour`, `presence` (yes or no) or `category`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.errors import ConfigError
from core.progress import progress_log, track
from demo.data.domain import RECEIPT, current
from demo.data.domains import DOMAINS, prepare_domain
from demo.data.packages import lock
from demo.data.questions_make import Picture, Question, make_questions
from demo.data.questions_pictures import read_pictures
from demo.data.questions_words import with_article
from streams.publish.folders import FolderItem, read_folder, write_folder

ASK_GARMENT: Final = ("what kind of clothing is this?", "which garment is this?")
SIZES: Final = {"train": (1000, 250), "test": (250, 75)}
"""Questions for the garment, and pairs of yes/no questions."""
SYNONYMS: Final = {"trousers": "pants", "pullover": "sweater", "sneaker": "running shoe", "ankle boot": "boot"}


def fashion_questions(folder: Path) -> Iterator[Question]:
    """Questions on Fashion-MNIST with its original splits; no picture is used twice."""
    for split, (garments, pairs) in SIZES.items():
        dice = random.Random(f"fashion:{split}")  # noqa: S311
        items = read_folder(folder, split)
        dice.shuffle(items)
        pictures = [Picture(item.path, "fashion", item.label, split, item.label, item.label) for item in items]
        rows = []
        for picture in pictures[:garments]:
            other = SYNONYMS.get(picture.name)
            answers = (picture.name, other) if other else (picture.name,)
            rows.append(Question(picture, split, "name", dice.choice(ASK_GARMENT), answers))
        by_name = defaultdict(list)
        for picture in pictures[garments:]:
            by_name[picture.name].append(picture)
        names = sorted(by_name)
        for number in range(pairs):
            name = names[number % len(names)]
            wrong = dice.choice([other for other in names if other != name and by_name[other]])
            text = f"is this {with_article(name)}?"
            rows.append(Question(by_name[name].pop(), split, "presence", text, ("yes",)))
            rows.append(Question(by_name[wrong].pop(), split, "presence", text, ("no",)))
        dice.shuffle(rows)
        yield from rows


VERSION: Final = 2
"""Increase it when questions change, so that existing folders are made again."""


@dataclass(frozen=True, slots=True)
class QuestionsInfo:
    name: str
    sources: tuple[str, ...]
    make: Callable[[Path, dict[str, Path]], Iterable[Question]]

    @property
    def licence(self) -> str:
        """All licences of the pictures in one line; the questions are under Ratchet's own."""
        return ", ".join(dict.fromkeys(DOMAINS[source].licence for source in self.sources))

    @property
    def attribution(self) -> str:
        return "; ".join(dict.fromkeys(DOMAINS[source].attribution for source in self.sources))


def _base(home: Path, folders: dict[str, Path]) -> list[Question]:
    return make_questions(list(read_pictures(home, folders)))


def _fashion(_: Path, folders: dict[str, Path]) -> Iterator[Question]:
    return fashion_questions(folders["fashion"])


QUESTIONS: Final[dict[str, QuestionsInfo]] = {
    info.name: info
    for info in (
        QuestionsInfo(
            name="vqa_base",
            sources=("noto", "twemoji", "openmoji", "openclipart", "pixel_ultica", "stamp_photo"),
            make=_base,
        ),
        QuestionsInfo(
            name="vqa_fashion",
            sources=("fashion",),
            make=_fashion,
        ),
    )
}
"""Sets for :func:`prepare_questions`. The shipped VLM is trained on the first; the other is new to it."""


def prepare_questions(name: str, home: Path | str) -> Path:
    """The question dataset `name` in `home`/data/`name`, made with its domains if missing. Safe to call repeatedly and
    from several processes. Raises `ConfigError` for an unknown name, `PackageError` when a package is unavailable."""
    if name not in QUESTIONS:
        raise ConfigError(f"there are no demo questions {name!r}.", f"Known: {', '.join(QUESTIONS)}.")
    info, target = QUESTIONS[name], Path(home) / "data" / name
    if current(target, VERSION):
        return target
    folders = {source: prepare_domain(source, home) for source in info.sources}
    with lock(target.with_name(f".{name}.lock")):
        if current(target, VERSION):
            return target
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
            staging = Path(scratch) / name
            _write(info, info.make(Path(home), folders), staging)
            if target.exists():
                target.rename(Path(scratch) / "old")
            staging.rename(target)
    return target


def _write(info: QuestionsInfo, questions: Iterable[Question], folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    rows = []
    for question in track(questions, f"writing {info.name}"):
        picture = question.picture
        path = folder / "images" / f"{picture.hand}-{picture.path.name}"
        if not path.exists():
            _place(picture.path, path)
        rows.append(
            FolderItem(
                path=path,
                text="",
                label=question.kind,
                concept=picture.concept,
                split=question.split,
                domain=info.name,
                source=picture.hand,
                question=question.question,
                answer=question.answers[0],
                answers=question.answers,
            )
        )
    counts = Counter((row.split, row.label) for row in rows)
    receipt = {
        "questions": info.name,
        "version": VERSION,
        "sources": list(info.sources),
        "licence": info.licence,
        "attribution": info.attribution,
        "rows": {f"{split} {kind}": number for (split, kind), number in sorted(counts.items())},
    }
    (folder / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
    write_folder(folder, rows)
    shown = ", ".join(f"{number} {what}" for what, number in receipt["rows"].items())  # type: ignore[attr-defined]
    progress_log.info(f"{info.name}: {shown}")


def _place(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
