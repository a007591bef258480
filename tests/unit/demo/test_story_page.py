from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from core.ledger import ReleaseRow
from demo.load.traffic import CheckedSample
from demo.story import page
from demo.story.captions import Change, Comparison, Hit, Search
from demo.story.page import Mark, Story, latency_chart, render
from demo.story.questions import AnswerComparison, Answered
from demo.story.screen import StoryProgress, plan_chapters
from demo.story.summary import Lesson
from streams.publish.folders import FolderItem
from tests.support.pictures import png
from tests.unit.demo.builders import BEGAN, facts, lesson

EVIL = "<script>alert(1)</script> & “more”"


def lesson_in(home: Path) -> Lesson:
    folder = home / "artifacts" / "reports"
    return lesson(str(folder / "u2" / "report.html"), str(folder / "u1" / "report.html"))


def releases() -> list[ReleaseRow]:
    adapters = (None, "clip-a", None, "clip-a")
    return [
        ReleaseRow(
            number=number,
            clip=clip,
            vlm=None,
            actor="updater",
            reason=EVIL,
            proposal_id=number,
            created_at=BEGAN + timedelta(seconds=10 * number),
        )
        for number, clip in enumerate(adapters, 1)
    ]


def samples(count: int = 200) -> list[CheckedSample]:
    first = BEGAN.timestamp()
    return [CheckedSample(first + number / 4, 0.02, 1 + number // 60, "", "clip") for number in range(count)]


def story(home: Path, pictures: int = 6) -> Story:
    hits = tuple(Hit(f"s{number}", EVIL, 0.5) for number in range(pictures))
    change = Change(Search(EVIL, hits, 101), Search(EVIL, hits, 1))
    progress = StoryProgress(plan_chapters("fluent3d"))
    with progress.chapter("start"):
        pass
    return Story(
        facts(lesson_in(home), None), progress.plan, Comparison("Two searches.", (change,)), None, samples(),
        releases(), {"emoji": "Emoji and their names."},
    )  # fmt: skip


def picture(_: str) -> bytes:
    return png("navy")


def test_it_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    text = render(story(tmp_path), picture, tmp_path)
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert any(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert sum(source.startswith("data:image/png;base64,") for source in sources) == 1  # the chart
    assert all(source.startswith(("data:image/", "artifacts/reports/")) for source in sources)
    assert "default-src 'none'" in text


def test_it_tells_the_rejected_candidate_the_swap_and_the_rollback(tmp_path: Path) -> None:
    text = " ".join(re.sub(r"<[^>]+>", " ", render(story(tmp_path), picture, tmp_path)).split())
    for words in (
        "1,234", "lost in 1 of 1 suites", "recall@5 · 200 items", "Emoji and their names.", "31.0 ✗ fails",
        "not among the first 100", "at rank 1", "42 ms", "answered 51 s after the start", "ratchet demo --with-vlm",
    ):  # fmt: skip
        assert words in text


def test_with_the_vlm_it_shows_the_answers_that_changed(tmp_path: Path) -> None:
    (tmp_path / "bag.png").write_bytes(png("navy"))
    item = FolderItem(path=tmp_path / "bag.png", text="", question="what is this?", answer="a bag", answers=("a bag",))
    told = story(tmp_path)
    told = replace(
        told, facts=replace(told.facts, vlm=lesson_in(tmp_path), vlm_requests=9),
        answers=AnswerComparison("One question.", (Answered(item, "a cat", "a bag"),)),
    )  # fmt: skip
    text = render(told, picture, tmp_path)
    assert '<span class="bad">a cat</span>' in text
    assert '<span class="good">a bag</span>' in text
    assert "VLM: one update rejected" in text
    assert "--with-vlm" not in text


def test_its_pictures_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MOST_BYTES", 3000)
    text = render(story(tmp_path, pictures=50), picture, tmp_path)
    drawn = re.findall(r'src="(data:image/jpeg[^"]*)"', text)
    assert 0 < sum(map(len, drawn)) <= 2 * 3000  # each picture is on both sides


def test_the_chart_counts_the_requests_around_the_releases() -> None:
    first = BEGAN.timestamp()
    many = [CheckedSample(first + number / 10, 0.02, 1, "", "clip") for number in range(100)]
    late = CheckedSample(first + 5, 0.5, 0, "503 busy", "clip")
    far = CheckedSample(first + 500, 9.0, 1, "", "clip")
    chart = latency_chart([*many, late, far], [Mark(first + 5, "release 2")])
    assert chart is not None
    assert (chart.requests, chart.failed, chart.median_ms, chart.slowest_ms) == (101, 1, 20.0, 500.0)
    assert latency_chart([far], [Mark(first, "")]) is None
    assert latency_chart(many, []) is None
