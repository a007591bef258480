"""The end of the demo: tables, JSON lines, and the checks that decide the exit status."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from core.ledger import VerdictRow

ROLLBACK_SECONDS = 1.0  # promised to operators
LOG_COLUMNS = 130  # a log has no width, and 80 columns would cut the tables


@dataclass(frozen=True)
class Lesson:
    """One model's course: a naive update, the default one, its release and rollback. Times are seconds."""

    naive: VerdictRow
    default: VerdictRow
    prepare_seconds: float
    commit_seconds: float
    rollback_seconds: float
    budget: dict[str, float]
    report: str
    naive_report: str = ""


@dataclass(frozen=True)
class Facts:
    """Figures measured by the story. Times are seconds."""

    release: int
    clip: Lesson
    vlm: Lesson | None
    requests: int
    vlm_requests: int
    failed: int
    mixed: int
    event_to_searchable_seconds: float
    seconds: float
    first_search_seconds: float = 0.0
    """From the start to the first search with a result."""
    chapters: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    page: str = ""

    @property
    def lessons(self) -> dict[str, Lesson]:
        return {"CLIP": self.clip} | ({} if self.vlm is None else {"VLM": self.vlm})


def as_json(facts: Facts) -> dict[str, Any]:
    """The demo's last line: CLIP's figures at the top level, the VLM's in ``vlm`` (null without it)."""
    return {
        "release": facts.release,
        **_lesson(facts.clip),
        "vlm": None if facts.vlm is None else _lesson(facts.vlm),
        "requests": facts.requests,
        "vlm_requests": facts.vlm_requests,
        "failed": facts.failed,
        "mixed": facts.mixed,
        "event_to_searchable_seconds": round(facts.event_to_searchable_seconds, 3),
        "seconds": round(facts.seconds, 1),
    }


def _lesson(lesson: Lesson) -> dict[str, Any]:
    suites = {
        name: {
            "role": suite["role"],
            "before": round(suite["before"], 4),
            "after": round(suite["after"], 4),
            "ci": [round(bound, 4) for bound in suite["ci"]],
            "decision": suite["decision"],
        }
        for name, suite in lesson.default.summary["suites"].items()
    }
    return {
        "naive_verdict": lesson.naive.outcome,
        "naive_caught_by": list(lesson.naive.summary["caught_by"]),
        "default_verdict": lesson.default.outcome,
        "suites": suites,
        "prepare_seconds": round(lesson.prepare_seconds, 3),
        "commit_seconds": round(lesson.commit_seconds, 4),
        "rollback_seconds": round(lesson.rollback_seconds, 4),
        "budget": {name: round(value, 1) for name, value in lesson.budget.items()},
        "report": lesson.report,
    }


def broken_promises(facts: Facts) -> list[str]:
    """Promises that the demo did not keep, in words; empty if it kept all."""
    broken = []
    unasked = facts.vlm is not None and not facts.vlm_requests
    if facts.failed or not facts.requests or unasked:
        broken.append(f"{facts.failed} of {facts.requests} requests failed ({facts.vlm_requests} were to the VLM)")
    if facts.mixed:
        broken.append(f"{facts.mixed} answers did not belong to the release they were stamped with")
    for name, lesson in facts.lessons.items():
        broken += [f"{name}: {promise}" for promise in _broken(lesson)]
    return broken


def _broken(lesson: Lesson) -> list[str]:
    suites = lesson.default.summary["suites"].values()
    losses = [name for name, suite in lesson.naive.summary["suites"].items() if suite["decision"] == "failed"]
    checks = {
        f"the naive update was {lesson.naive.outcome}, not rejected": lesson.naive.outcome != "rejected",
        "no retention suite caught the naive update": not losses,
        f"the default update was {lesson.default.outcome}, not passed": lesson.default.outcome != "passed",
        "no gain suite was won": not any(s["role"] == "gain" and s["decision"] == "passed" for s in suites),
        "a retention suite was lost": any(s["role"] == "retention" and s["decision"] != "passed" for s in suites),
        f"a rollback took {lesson.rollback_seconds:.2f} s": lesson.rollback_seconds >= ROLLBACK_SECONDS,
    }
    return [promise for promise, broken in checks.items() if broken]


def show(facts: Facts) -> None:
    """Print the tables, links, a JSON line of times, and the JSON line of figures (last)."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_COLUMNS)
    for name, lesson in facts.lessons.items():
        console.print(_suites(f"The default {name} update", lesson))
        console.print(_course(f"The {name} loop", lesson))
    table = Table(show_header=False, title="All of it")
    for label, value in (
        ("live", f"release {facts.release}"),
        ("requests during all of it",
         f"{facts.requests} ({facts.vlm_requests} to the VLM): {facts.failed} failed, {facts.mixed} mixed"),
        ("first search that found something", f"{facts.first_search_seconds:.1f} s after the start"),
        ("event to searchable", f"{facts.event_to_searchable_seconds:.1f} s"),
        ("took", f"{facts.seconds / 60:.1f} minutes"),
        ("of these", ", ".join(f"{name} {seconds:.0f} s" for name, seconds in facts.chapters.items())),
        ("the story with pictures", facts.page),
    ):  # fmt: skip
        table.add_row(label, value)
    console.print(table)
    for problem in facts.problems:
        console.print(f"[bold red]problem:[/bold red] {problem}")
    for promise in broken_promises(facts):
        console.print(f"[bold red]not as promised:[/bold red] {promise}")
    times = {
        "first_search_seconds": round(facts.first_search_seconds, 1),
        "chapters": {name: round(seconds, 1) for name, seconds in facts.chapters.items()},
        "page": facts.page,
    }
    print(json.dumps(times), flush=True)
    print(json.dumps(as_json(facts)), flush=True)


def _suites(title: str, lesson: Lesson) -> Table:
    table = Table("suite", "role", "metric", "items", "base", "after", "difference", "decision", title=title)
    for name, suite in lesson.default.summary["suites"].items():
        span = f"{suite['after'] - suite['before']:+.3f}  [{suite['ci'][0]:+.3f}, {suite['ci'][1]:+.3f}]"
        table.add_row(
            name, suite["role"], suite["metric"], str(suite["n"]), f"{suite['before']:.3f}", f"{suite['after']:.3f}",
            span, suite["decision"], style="green" if suite["decision"] == "passed" else "red",
        )  # fmt: skip
    return table


def _course(title: str, lesson: Lesson) -> Table:
    table = Table(show_header=False, title=title)
    for name, value in (
        ("naive update", f"{lesson.naive.outcome}, caught by {', '.join(lesson.naive.summary['caught_by'])}"),
        ("default update", lesson.default.outcome),
        ("prepare / commit / rollback", f"{lesson.prepare_seconds:.2f} s / {lesson.commit_seconds * 1000:.0f} ms / "
         f"{lesson.rollback_seconds * 1000:.0f} ms"),
        ("budget", ", ".join(f"{name} {value:,.0f}" for name, value in lesson.budget.items()) + " MAF-GFLOPs"),
        ("gate report", lesson.report),
    ):  # fmt: skip
        table.add_row(name, value)
    return table
