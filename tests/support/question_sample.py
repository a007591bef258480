"""Takes the sample of the demo's questions for the tests of the shipped VLM: drawing all of them takes three minutes.

    python -m tests.support.question_sample tests/integration/updater/vqa_base

It is a dataset like the whole one, with its receipt: the first questions of each kind of the test split, and for each
of them the most frequent answer of the training split, which is all that scoring needs.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from demo.data import DOMAINS, prepare_questions
from demo.data.domain import RECEIPT
from demo.vlm.scores import usual_answers
from demo.vlm.shipped import TRAINED_ON
from streams.publish.folders import FolderItem, read_folder, write_folder

EACH = 60
SOURCES = ("noto", "twemoji", "openclipart")
"""Sources whose pictures may be redistributed with attribution only: Apache-2.0, CC-BY-4.0, public domain."""


def take_sample(whole: Path, target: Path) -> None:
    taken: dict[str, list[FolderItem]] = defaultdict(list)
    for item in read_folder(whole, "test"):
        if item.source in SOURCES and len(taken[item.label]) < EACH:
            taken[item.label].append(item)
    usual = usual_answers(read_folder(whole, "train"))
    (target / "images").mkdir(parents=True)
    rows = []
    for item in (item for kind in sorted(taken) for item in taken[kind]):
        path = target / "images" / item.path.name
        shutil.copyfile(item.path, path)
        rows.append(dataclasses.replace(item, path=path))
    by_question = {item.question: item for item in rows}
    for question in sorted(by_question.keys() & usual.keys()):
        answer = usual[question]
        rows.append(dataclasses.replace(by_question[question], split="train", answer=answer, answers=(answer,)))
    receipt = {
        **json.loads((whole / RECEIPT).read_text()),
        "sources": SOURCES,
        "licence": ", ".join(DOMAINS[name].licence for name in SOURCES),
        "attribution": "; ".join(DOMAINS[name].attribution for name in SOURCES),
        "rows": {kind: len(items) for kind, items in sorted(taken.items())},
    }
    (target / RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
    write_folder(target, rows)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        take_sample(prepare_questions(TRAINED_ON, home), Path(sys.argv[1]))
