from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from core.errors import RatchetError
from core.progress import progress_log
from demo.story.screen import Screen, StoryProgress, plan_chapters

LINKS = {"console": "http://127.0.0.1:8001"}


def screen(terminal: bool) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, height=60)
    return Screen(StoryProgress(plan_chapters("fluent3d")), LINKS, console), out


def shown(each: Screen) -> str:
    console = Console(file=io.StringIO(), width=100)
    with console.capture() as capture:
        console.print(each.render())
    return capture.get()


def test_a_terminal_has_all_chapters_the_current_one_with_its_reason_and_the_console_at_every_moment() -> None:
    each, _ = screen(terminal=True)
    with each:
        assert LINKS["console"] in shown(each)
        with each.chapter("start"):
            progress_log.info("starting Ray ...")
            text = shown(each)
            for chapter in each.story.plan:
                assert chapter.title[:60] in text
            assert "on what package registries ship" in text
            assert "starting Ray ..." in text
            assert LINKS["console"] in text
        assert "✓" in shown(each)


def test_elsewhere_each_chapter_is_a_line_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    each, out = screen(terminal=False)
    with each, each.chapter("naive"):
        pass
    assert "3  A naive update is trained, and the gate rejects it" in out.getvalue()
    said = " ".join(capsys.readouterr().err.split())
    assert LINKS["console"] in said
    assert "Regression tests on held-out data find out" in said


def test_lines_of_a_child_stay_inside_the_screen_and_are_no_markup() -> None:
    each, _ = screen(terminal=True)
    with each, each.chapter("naive"):
        each.run([sys.executable, "-c", "print('2026-11-28T12:00:00.000Z INFO ratchet.progress: gate: suite [1/8]')"])
        text = shown(each)
    assert "gate: suite [1/8]" in text
    assert "12:00:00" not in text and "INFO" not in text


def test_a_text_with_brackets_and_a_small_terminal_do_not_break_the_screen() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    each = Screen(StoryProgress(plan_chapters("fluent3d")), LINKS, console)
    with each, each.chapter("stream"):
        for number in range(40):
            progress_log.info(f"“[/red] {number}” found pictures " + "and more " * 20)
        lines = shown(each).splitlines()
    assert "39” found pictures" in "\n".join(lines)
    assert len(lines) <= 24


@pytest.mark.parametrize("terminal", [True, False])
def test_a_child_that_fails_ends_the_story_and_its_last_words_are_left_on_the_terminal(terminal: bool) -> None:
    each, out = screen(terminal)
    with pytest.raises(RatchetError, match="ended with status 3"), each, each.chapter("naive"):
        each.run([sys.executable, "-c", "print('out of memory'); raise SystemExit(3)"])
    assert not terminal or "out of memory" in out.getvalue().rpartition("\x1b[?1049l")[2]
    progress_log.info("to standard error again")


def test_the_vlm_has_chapters_only_where_it_has_a_part() -> None:
    names = [chapter.name for chapter in plan_chapters("fluent3d")]
    assert names == ["start", "stream", "naive", "default", "rollback", "compare", "check"]
    assert len(plan_chapters("fluent3d", "vqa_fashion")) == 11
