"""``demo.html``: the story of a demo with pictures, in one self-contained file."""

from __future__ import annotations

import io
import os
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import jinja2
from PIL import Image

from core.files import replace_file
from core.ledger import ReleaseRow
from demo.load.traffic import CheckedSample
from demo.story.captions import DEPTH, Comparison, Hit, Search
from demo.story.questions import AnswerComparison
from demo.story.screen import Chapter, clock
from demo.story.stage import SOME_ANSWERS_SECONDS
from demo.story.summary import Facts, Lesson
from updater.gate.plots import BAD, BEFORE, GOOD, MUTED, drawn, figure, style
from updater.gate.report import TEMPLATES as PALETTE

TEMPLATES = Path(__file__).parent / "templates"
SIDE = 96  # pixels of a thumbnail
QUALITY = 80  # JPEG quality of a thumbnail: 2 to 5 KB
BEFORE_SECONDS, AFTER_SECONDS = 20.0, SOME_ANSWERS_SECONDS
"""Of the chart: before the first release, and after the last until the demo starts hundreds of searches of its own."""
RELEASES = GOOD, BEFORE
"""By the parity of a release: the first is the base, and each change of CLIP goes from one model to the other."""
MOST_BYTES = 1_500_000
"""Total of all encoded pictures; later ones are left out."""


@dataclass(frozen=True)
class Story:
    facts: Facts
    chapters: Sequence[Chapter]
    searches: Comparison
    answers: AnswerComparison | None
    samples: Sequence[CheckedSample]
    releases: Sequence[ReleaseRow]
    """Oldest first."""
    about: Mapping[str, str]


def write_page(story: Story, image: Callable[[str], bytes], path: Path) -> Path:
    """Write the page. ``image``: returns the encoded picture of a sample by ID."""
    replace_file(path, render(story, image, path.parent).encode())
    return path


def render(story: Story, image: Callable[[str], bytes], home: Path) -> str:
    """Render the page with links relative to ``home``. Sample texts are escaped, pictures embedded in bounded size."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([TEMPLATES, PALETTE]),
        autoescape=True,  # captions are untrusted
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clock": clock, "milliseconds": _milliseconds, "points": _points}
    pictures = Pictures(image)
    facts = story.facts
    return environment.get_template("demo.html").render(
        facts=facts,
        chapters=[chapter for chapter in story.chapters if chapter.began is not None],
        searches=story.searches,
        pairs=[(_side(change.before, pictures), _side(change.after, pictures)) for change in story.searches.changes],
        depth=DEPTH,
        answers=story.answers,
        answer_pictures=[pictures.encoded(each.item.bytes()) for each in story.answers.answers]
        if story.answers
        else [],
        suites={name: suite_rows(lesson, story.about) for name, lesson in facts.lessons.items()},
        reports={name: _links(lesson, home) for name, lesson in facts.lessons.items()},
        chart=latency_chart([each for each in story.samples if each.family == "clip"], marks(story.releases)),
        releases=story.releases,
    )


class Pictures:
    """Thumbnails as data URIs, cached, until :data:`MOST_BYTES` are spent."""

    def __init__(self, image: Callable[[str], bytes]) -> None:
        self._image = image
        self._made: dict[str, str] = {}
        self._left = MOST_BYTES

    def of(self, sample_id: str) -> str:
        """Thumbnail of a sample; empty if there is no room."""
        if sample_id not in self._made:
            self._made[sample_id] = self.encoded(self._image(sample_id))
        return self._made[sample_id]

    def encoded(self, picture: bytes) -> str:
        """Thumbnail of an encoded picture; empty if there is no room."""
        thumbnail = Image.open(io.BytesIO(picture)).convert("RGB")
        thumbnail.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        thumbnail.save(buffer, "JPEG", quality=QUALITY)
        uri = f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"
        if len(uri) > self._left:
            return ""
        self._left -= len(uri)
        return uri


def suite_rows(lesson: Lesson, about: Mapping[str, str]) -> list[dict[str, Any]]:
    """A row per suite: description, and scores (0 to 1) of base, naive and default update. Gains come first."""
    naive = lesson.naive.summary["suites"]
    rows = [
        {
            "name": name, "role": suite["role"], "metric": suite["metric"], "items": suite["n"],
            "about": about.get(name) or f"Items of the stream that were not trained on ({name}).",
            "before": suite["before"], "after": suite["after"], "ci": suite["ci"], "decision": suite["decision"],
            "naive": naive.get(name, {}).get("after"), "naive_decision": naive.get(name, {}).get("decision", ""),
            "margin": suite.get("margin"),
        }
        for name, suite in lesson.default.summary["suites"].items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row["role"] != "gain")


@dataclass(frozen=True)
class Mark:
    at: float
    label: str


def marks(releases: Sequence[ReleaseRow]) -> list[Mark]:
    changed = [release for before, release in pairwise(releases) if release.clip != before.clip]
    labels = ("the update", "rolled back", "rolled forward")
    return [
        Mark(release.created_at.timestamp(), f"release {release.number}: {label}")
        for release, label in zip(changed, labels, strict=False)
    ]


@dataclass(frozen=True)
class Chart:
    """The latency of each request around the swap and the rollback."""

    picture: str
    requests: int
    failed: int
    median_ms: float
    slowest_ms: float


def latency_chart(samples: Sequence[CheckedSample], marks: Sequence[Mark]) -> Chart | None:
    """The requests around the marks; None without data."""
    if not marks:
        return None
    swap, last = marks[0].at, marks[-1].at
    inside = [each for each in samples if swap - BEFORE_SECONDS <= each.due <= last + AFTER_SECONDS]
    if not inside:
        return None
    times = [each.seconds * 1000 for each in inside]
    failed = sum(bool(each.problem) for each in inside)
    return Chart(_drawn(inside, times, marks), len(inside), failed, median(times), max(times))


def _drawn(samples: Sequence[CheckedSample], times: Sequence[float], marks: Sequence[Mark]) -> str:
    plot, swap = figure(height=2.9, width=7.0), marks[0].at
    axes = plot.add_axes((0.09, 0.16, 0.89, 0.66))
    style(axes)
    colours = [BAD if each.problem else RELEASES[each.release % 2] for each in samples]
    axes.scatter([each.due - swap for each in samples], times, s=9, c=colours)
    axes.set_yscale("log")
    axes.tick_params(axis="y", which="both", length=0, colors=MUTED)
    axes.yaxis.set_major_formatter("{x:g} ms")
    axes.set_xlabel("seconds from the swap", color=MUTED)
    for number, mark in enumerate(marks):  # each label left of its line, on a line of its own
        axes.axvline(mark.at - swap, color=MUTED, linestyle="--", linewidth=0.8)
        axes.annotate(
            mark.label, (mark.at - swap, 1.0), (-3, 3 + 11 * number), xycoords=("data", "axes fraction"),
            textcoords="offset points", fontsize=9, color=MUTED, ha="right",
        )  # fmt: skip
    return drawn(plot, "Latency of each request over time, with the moments of swap and rollback", "l")


def _side(search: Search, pictures: Pictures) -> dict[str, Any]:
    def hit(each: Hit) -> dict[str, Any]:
        picture = pictures.of(each.id)
        return {"text": each.text, "score": each.score, "picture": picture, "right": search.right(each)}

    return {"query": search.query, "rank": search.rank, "hits": [hit(each) for each in search.hits]}


def _links(lesson: Lesson, home: Path) -> dict[str, str]:
    """Links to the gate's pages, relative to ``home``."""
    return {
        name: os.path.relpath(report, home)
        for name, report in (("naive", lesson.naive_report), ("default", lesson.report))
        if report
    }


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms"


def _points(share: float) -> str:
    return f"{share * 100:+.1f}".replace("-", "−")
