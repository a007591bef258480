"""The parts of the questions that a VLM learns, is tuned and is asked by."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.continual import questions
from benchmarks.continual.questions import KINDS, OUTSIDE, PROTOCOL, UPDATES, load_questions
from benchmarks.continual.stream import LEAST_TUNING
from demo.vlm.shipped import TRAINED_ON
from streams.publish.folders import FolderItem
from tests.unit.updater.builders import picture

NOUNS = ("cat", "dog", "house", "tree", "car", "boat", "bird", "fish")
EACH = 800


def _domain(path: Path) -> list[FolderItem]:
    name, first = path.name, 10_000 * [*(s.domain for s in (*UPDATES, *OUTSIDE)), TRAINED_ON].index(path.name)
    items = []
    for number in range(EACH):
        split, noun = "test" if number % 5 == 0 else "train", NOUNS[number % len(NOUNS)]
        base = {"question": "what is it?", "answer": noun, "label": KINDS[number % 4]} if name == TRAINED_ON else {}
        items.append(
            FolderItem(
                path / f"{number}.png",
                f"a {noun}",
                **({"label": noun} | base),
                concept=f"{noun} {number // 2}",
                split=split,
                domain=name,
                inline=picture(first + number, 12),
            )
        )
    return items


def test_no_question_is_in_two_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "read_folder", _domain)
    protocol = replace(PROTOCOL, new=60, items=40)
    stream = load_questions(tmp_path, protocol)
    tuning = stream.for_tuning()
    assert list(tuning.updates) == list(stream.updates) and tuning.reference == stream.reference
    assert {suite.name for suite in tuning.suites} <= {suite.name for suite in stream.suites}
    for name, update in stream.updates.items():
        parts = [
            {each.id for each in update},
            {each.id for each in tuning.updates[name]},
            *({asked.id for asked in s.items} for made in (stream, tuning) for s in made.suites if s.name == name),
        ]
        assert len(parts) == 4 and all(len(part) >= LEAST_TUNING for part in parts), [len(part) for part in parts]
        assert len(set.union(*parts)) == sum(map(len, parts)), "no picture is in two of them"
    for kind in KINDS:
        own = [{asked.id for asked in s.items} for made in (stream, tuning) for s in made.suites if s.name == kind]
        assert all(own) and sum(map(len, own)) == len(set.union(*own))
    assert [suite.name for suite in stream.suites if suite.role == "unseen"] == ["clothes_unseen", "digits_unseen"]


def test_a_domain_with_few_other_pictures_is_tuned_on_those_of_its_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "read_folder", _domain)
    stream = load_questions(tmp_path, replace(PROTOCOL, new=1000))
    assert stream.tuning_updates == stream.updates
