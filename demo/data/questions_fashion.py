"""Questions about Fashion-MNIST: a domain that the shipped VLM has not seen, to be learnt by an update."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from demo.data.questions_make import Picture, Question
from demo.data.questions_words import with_article
from streams.publish.folders import read_folder

ASK_GARMENT: Final = ("what kind of clothing is this?", "which garment is this?")
SIZES: Final = {"train": (1000, 250), "test": (250, 75)}
"""Questions for the garment, and pairs of yes/no questions."""
SYNONYMS: Final = {"trousers": "pants", "pullover": "sweater", "sneaker": "running shoe", "ankle boot": "boot"}


def fashion_questions(folder: Path) -> Iterator[Question]:
    """Splits are the original's; no picture is asked about twice."""
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
