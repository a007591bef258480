"""The shipped VLM scores what the repository says it does, and it looks at the picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from demo.vlm import build_vlm, score_vlm
from demo.vlm.scores import SCORES, committed_scores
from demo.vlm.shipped import ASSETS, MODEL
from tests.support.question_sample import EACH

SAMPLE = Path(__file__).with_name("vqa_base")
"""Made by tests/support/question_sample.py."""


@pytest.mark.integration
def test_the_committed_scores_can_be_reproduced(tmp_path: Path) -> None:
    shutil.copytree(SAMPLE, tmp_path / "data" / SAMPLE.name)  # where the whole would be made
    measured = score_vlm(build_vlm(tmp_path))
    written = committed_scores()
    assert measured.keys() == written.keys()
    assert {figures["items"] for figures in measured.values()} == {EACH}
    for kind, figures in measured.items():
        share = written[kind]["model"]
        slack = 3 * (share * (1 - share) / EACH) ** 0.5  # three standard errors of a sample of this size
        assert abs(figures["model"] - share) <= slack, kind
        assert figures["model"] > max(figures["majority"], figures["blind"]) + 0.1, kind


def test_the_committed_scores_are_of_the_committed_model(tmp_path: Path) -> None:
    base = build_vlm(tmp_path)
    assert json.loads((ASSETS / SCORES).read_text())["base"] == base.digest
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 9_000_000


def test_every_kind_of_question_needs_the_picture() -> None:
    scores = committed_scores()
    assert scores.keys() == {"name", "colour", "presence", "category"}
    for kind, figures in scores.items():
        assert figures["model"] > max(figures["majority"], figures["blind"]) + 0.15, kind
        assert figures["items"] >= 250, kind
