"""The demo's story: its waiting, its screen, its page and its summary."""

from __future__ import annotations

import io
import json
import re
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from core.errors import RatchetError
from core.ledger import ReleaseRow
from core.ledger.rows import GateOutcome, VerdictRow
from core.progress import progress_log
from core.settings import Settings
from demo.load.traffic import CheckedSample
from demo.story.captions import Change, Comparison, Hit, Search
from demo.story.page import Story, render
from demo.story.screen import Screen, StoryProgress, plan_chapters
from demo.story.stage import Stage
from demo.story.story import _free_ports, _settle
from demo.story.summary import Facts, Lesson, as_json, broken_promises, show
from ops.cli.context import Context
from ratchet_client import ServerError
from tests.support.clock import Clock
from tests.support.pictures import png

BEGAN = datetime(2026, 1, 1, 12, tzinfo=UTC)


def verdict(outcome: GateOutcome, retention: str, gain: str = "passed", after: float = 0.6) -> VerdictRow:
    suite = {
        "role": "retention", "metric": "recall@5", "n": 200, "base": 0.5, "before": 0.5, "after": after,
        "ci": [0.02, 0.18], "margin": 0.05, "decision": retention,
    }  # fmt: skip
    fresh = {**suite, "role": "gain", "margin": None, "decision": gain}
    caught = ["emoji"] if retention == "failed" else []
    summary = {"suites": {"emoji": suite, "fresh.new": fresh}, "caught_by": caught}
    return VerdictRow(
        update_id="u1", adapter="clip-a", outcome=outcome, report_key="reports/u1", summary=summary, created_at=BEGAN
    )


LESSON = Lesson(
    naive=verdict("rejected", "failed", after=0.31), default=verdict("passed", "passed"), prepare_seconds=1.0,
    commit_seconds=0.018, rollback_seconds=0.042, budget={"planned": 10.0, "spent": 9.0}, report="report.html",
)  # fmt: skip
FACTS = Facts(
    release=4, clip=LESSON, vlm=LESSON, requests=1234, vlm_requests=33, failed=0, mixed=0,
    event_to_searchable_seconds=2.4, seconds=300.0, first_search_seconds=51.0,
)  # fmt: skip


def test_the_last_two_lines_are_json_of_times_and_figures(capsys: pytest.CaptureFixture[str]) -> None:
    show(replace(FACTS, first_search_seconds=51.26, chapters={"start": 31.02, "stream": 20.5}, page="demo.html"))
    times, last = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert times == {"first_search_seconds": 51.3, "chapters": {"start": 31.0, "stream": 20.5}, "page": "demo.html"}
    assert (last["naive_verdict"], last["naive_caught_by"]) == ("rejected", ["emoji"])
    assert last["suites"]["fresh.new"] == {
        "role": "gain", "before": 0.5, "after": 0.6, "ci": [0.02, 0.18], "decision": "passed",
    }  # fmt: skip
    assert (last["failed"], last["mixed"], last["budget"]) == (0, 0, {"planned": 10.0, "spent": 9.0})
    assert (last["vlm"]["naive_caught_by"], last["vlm_requests"]) == (["emoji"], 33)
    without = replace(FACTS, vlm=None, vlm_requests=0)
    assert broken_promises(FACTS) == broken_promises(without) == []
    assert as_json(without).keys() == last.keys() and as_json(without)["vlm"] is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"failed": 1}, "1 of 1234 requests failed"),
        ({"requests": 0}, "0 of 0 requests"),
        ({"vlm_requests": 0}, "(0 were to the VLM)"),
        ({"mixed": 2}, "2 answers"),
    ],
)
def test_a_promise_about_requests_that_was_not_kept_is_named(change: dict[str, int], words: str) -> None:
    assert any(words in promise for promise in broken_promises(replace(FACTS, **change)))


@pytest.mark.parametrize("family", ["clip", "vlm"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"naive": verdict("passed", "passed")}, "naive update was passed"),
        ({"default": verdict("inconclusive", "inconclusive")}, "default update was inconclusive"),
        ({"default": verdict("passed", "passed", gain="inconclusive")}, "no gain suite"),
        ({"rollback_seconds": 1.5}, "rollback took 1.50 s"),
    ],
)
def test_a_promise_about_a_model_that_was_not_kept_is_named(family: str, change: dict[str, Any], words: str) -> None:
    broken = broken_promises(replace(FACTS, **{family: replace(LESSON, **change)}))
    assert any(words in promise and family.upper() in promise for promise in broken)


EVIL = "<script>alert(1)</script> & “more”"


def story(home: Path, pictures: int = 6) -> Story:
    reports = {name: str(home / "artifacts" / "reports" / update / "report.html")
               for name, update in (("report", "u2"), ("naive_report", "u1"))}  # fmt: skip
    hits = tuple(Hit(f"s{number}", EVIL, 0.5) for number in range(pictures))
    change = Change(Search(EVIL, hits, 101), Search(EVIL, hits, 1))
    progress = StoryProgress(plan_chapters("fluent3d"))
    with progress.chapter("start"):
        pass
    releases = [
        ReleaseRow(number=number, clip=clip, vlm=None, actor="updater", reason=EVIL, proposal_id=number,
                   created_at=BEGAN + timedelta(seconds=10 * number))
        for number, clip in enumerate((None, "clip-a", None, "clip-a"), 1)
    ]  # fmt: skip
    samples = [CheckedSample(BEGAN.timestamp() + n / 4, 0.02, 1 + n // 60, "", "clip") for n in range(200)]
    facts = replace(FACTS, clip=replace(LESSON, **reports), vlm=None, vlm_requests=0)
    return Story(
        facts, progress.plan, Comparison("Two searches.", (change,)), None, samples, releases,
        {"emoji": "Emoji and their names."},
    )  # fmt: skip


def picture(_: str) -> bytes:
    return png("navy")


def test_the_page_needs_nothing_from_outside_runs_nothing_and_tells_the_loop(tmp_path: Path) -> None:
    text = render(story(tmp_path), picture, tmp_path)
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert any(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all(source.startswith(("data:image/", "artifacts/reports/", "#")) for source in sources)
    assert "default-src 'none'" in text
    told = " ".join(re.sub(r"<[^>]+>", " ", text).split())
    for words in (
        "1,234", "lost more than the margin in 1 of the 1 suites", "recall@5 · 200 items", "Emoji and their names.",
        "31.0 ✗ fails", "not among the first 100", "at rank 1", "42 ms", "answered 51 s after the start",
        "ratchet demo --with-vlm",
    ):  # fmt: skip
        assert words in told


def test_labels_of_releases_that_follow_each_other_do_not_overlap(tmp_path: Path) -> None:
    made = story(tmp_path)
    close = [replace(row, created_at=BEGAN + timedelta(seconds=3 * row.number)) for row in made.releases]
    text = render(replace(made, releases=close), picture, tmp_path)
    labels = re.findall(r'<text font-size="([\d.]+)px"[^>]* y="([\d.]+)"[^>]*>release \d', text)
    sizes, heights = zip(*((float(size), float(y)) for size, y in labels), strict=True)
    assert len(labels) == 3 and all(lower - upper > max(sizes) for lower, upper in pairwise(heights))


LINKS = {"console": "http://127.0.0.1:8001"}


def screen(terminal: bool, height: int = 60) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, height=height)
    return Screen(StoryProgress(plan_chapters("fluent3d")), LINKS, console), out


def shown(each: Screen) -> str:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(each.render())
    return capture.get()


def test_a_terminal_has_all_chapters_the_current_one_with_its_reason_and_the_console_at_every_moment() -> None:
    names = [chapter.name for chapter in plan_chapters("fluent3d")]
    assert names == ["start", "stream", "naive", "default", "rollback", "compare", "check"]
    assert len(plan_chapters("fluent3d", "vqa_fashion")) == 11
    each, _ = screen(terminal=True)
    with each:
        assert LINKS["console"] in shown(each)
        with each.chapter("start"):
            progress_log.info("starting Ray ...")
            text = shown(each)
            assert all(chapter.title[:60] in text for chapter in each.story.plan)
            for words in ("on what package registries ship", "starting Ray ...", LINKS["console"]):
                assert words in text
        assert "✓" in shown(each)


def test_texts_with_brackets_lines_of_a_child_and_a_small_terminal_do_not_break_the_screen() -> None:
    each, _ = screen(terminal=True, height=24)
    with each, each.chapter("naive"):
        each.run([sys.executable, "-c", "print('2026-11-28T12:00:00.000Z INFO ratchet.progress: gate: suite [1/8]')"])
        text = shown(each)
        assert "gate: suite [1/8]" in text and "12:00:00" not in text and "INFO" not in text
        for number in range(40):
            progress_log.info(f"“[/red] {number}” found pictures " + "and more " * 20)
        lines = shown(each).splitlines()
    assert "39” found pictures" in "\n".join(lines) and len(lines) <= 24


@pytest.mark.parametrize("terminal", [True, False])
def test_a_child_that_fails_ends_the_story_and_its_last_words_are_left_on_the_terminal(terminal: bool) -> None:
    each, out = screen(terminal)
    with pytest.raises(RatchetError, match="ended with status 3"), each, each.chapter("naive"):
        each.run([sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"])
    assert not terminal or "out of memory" in out.getvalue().rpartition("\x1b[?1049l")[2]
    progress_log.info("to standard error again")


class Server:
    """Embeds a picture a minute for a release that is being prepared, and sometimes fails to answer."""

    def __init__(self, clock: Clock, stops_at: int = 60, state: str = "preparing", error: str = "") -> None:
        self.clock, self.began, self.stops_at = clock, clock.now, stops_at
        self.proposal = SimpleNamespace(id=1, update_id="u", state=state, error=error)
        self.asked = 0

    @property
    def rows(self) -> int:
        return min(self.stops_at, int((self.clock.now - self.began) / 60))

    def status(self) -> dict[str, Any]:
        catalog = {"corpus_rows": 60, "spaces": {"new": {"rows": self.rows}}}
        return {"controller": {"resident": [{"release": 1}], "trouble": ""}, "catalog": catalog}

    def releases(self, limit: int) -> dict[str, Any]:
        self.asked += 1
        if self.asked % 5 == 0:
            raise ServerError("the server does not answer: timed out")
        return {"data": [{"clip": "clip-new" if self.rows == 60 else None, "vlm": None}]}

    def live(self) -> int:
        return 2

    def proposals(self, limit: int) -> list[Any]:
        return [self.proposal]

    def audit_rows(self) -> list[Any]:
        return [SimpleNamespace(subject="release 2", action="released", detail={"prepare_seconds": 1.0})]

    def await_release(self, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
        made, nothing = cast(Any, self), cast(Any, None)
        parts = cast(Any, SimpleNamespace(check=check, work=int))
        stage = Stage(Context(None, []), nothing, parts, made, made, nothing)
        return stage.await_release("clip", replace(verdict("passed", "passed"), adapter="clip-new", update_id="u"))


def test_a_release_is_waited_for_while_it_gets_further(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock()
    monkeypatch.setattr("core.waiting.time", SimpleNamespace(monotonic=clock, sleep=clock.sleep))

    def ended() -> None:
        raise RatchetError("serve ended: out of memory")

    assert Server(clock).await_release() == {"prepare_seconds": 1.0}
    far = "proposal 1 is preparing; resident releases: 1; pictures embedded for search: 30 of 60"
    assert far in " ".join(capsys.readouterr().err.split())
    with pytest.raises(RatchetError, match=r"preparing the release stands still: .* 7 of 60"):
        Server(clock, stops_at=7).await_release()
    with pytest.raises(RatchetError, match="was not released: golden inputs differ"):
        Server(clock, state="failed", error="golden inputs differ").await_release()
    with pytest.raises(RatchetError, match="serve ended: out of memory"):
        Server(clock).await_release(ended)


def test_a_taken_port_is_replaced_by_a_free_one_and_none_is_given_out_twice(tmp_path: Path) -> None:
    usual = Settings()
    with socket.create_server(("127.0.0.1", 0)) as first:
        held = first.getsockname()[1]
        assert usual.serve.port + 1 == usual.console.port  # so that a server that gives way would meet the console
        serve, console = _free_ports(f"127.0.0.1:{held}", f"127.0.0.1:{held + 1}")
    assert serve != f"127.0.0.1:{held}" and serve != console
    settings = _settle(tmp_path, with_vlm=False).settings
    ports = {settings.serve.port, settings.console.port, int(settings.kafka.bootstrap.rpartition(":")[2])}
    assert len(ports) == 3
