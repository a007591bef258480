"""The chapters of the demo and its display: a full screen on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from core.child_process import reaped, stop_reaped
from core.errors import RatchetError
from core.progress import progress_log, send_to, styled

LINES = 10
LEAST_LINES = 3
OTHER_LINES = 11
"""Screen lines used by the head, frames, and the chapter's title and reason."""
REFRESHES_PER_SECOND = 4
STOP_SECONDS = 10.0
"""Time for a command to end when the demo is stopped."""
_HEAD = re.compile(r"^\d{4}-\d\d-\d\dT[\d:.]+Z [A-Z]+ [\w.]+: ")
"""Prefix of a child's log lines; the screen shows the time of arrival instead."""


@dataclass
class Chapter:
    """One part of the story. Times are monotonic seconds."""

    name: str
    title: str
    why: str
    began: float | None = None
    ended: float | None = None

    def seconds(self) -> float:
        if self.began is None:
            return 0.0
        return (time.monotonic() if self.ended is None else self.ended) - self.began


def plan_chapters(domain: str, questions: str = "") -> list[Chapter]:
    """The chapters. ``domain``: new to CLIP; ``questions``: new to the VLM, empty without a VLM."""
    plan = [
        Chapter(
            "start", "A base model, a broker, a server and a console start",
            "Everything runs on this machine, on what package registries ship. The server answers as soon as CLIP is "
            "there; data for the trainer and the gate is downloaded meanwhile.",
        ),
        Chapter(
            "stream", f"The stream brings pictures that the base has not seen: {domain}",
            "Samples arrive through Kafka, exactly once. They can be found seconds later, before anything has learned "
            "from them. From now on a steady load asks the server, and every answer will be checked.",
        ),
        Chapter(
            "naive", "A naive update is trained, and the gate rejects it",
            "Training on the new data alone learns it, and forgets what the model could do before. Regression tests on "
            "held-out data find out before any client does.",
        ),
        Chapter(
            "default", "The default update is trained, passes the gate, and is swapped in under the load",
            "It is held to what the model knew, so that every suite stays inside its margin. Each request is answered "
            "by one release alone; none fails, and none mixes two.",
        ),
        Chapter(
            "rollback", "An operator rolls the update back, then forward again",
            "The previous model stays in memory with its complete search index, so going back takes milliseconds.",
        ),
        Chapter(
            "compare", "The same searches before and after the update",
            "Scores say how much was learned; pictures say what. Both releases are loaded, and each is asked by name.",
        ),
    ]  # fmt: skip
    if questions:
        plan += [
            Chapter(
                "questions", f"The stream brings questions about images that the VLM has not seen: {questions}",
                "The same stream, the same store: a sample is an image with a text, or with a question and its answer.",
            ),
            Chapter(
                "vlm-naive", "A naive VLM update is trained, and the gate rejects it",
                "A generative model forgets as well: what it answered right before, it now answers with the new words.",
            ),
            Chapter(
                "vlm-default", "The default VLM update is trained, passes the gate, and is swapped in under the load",
                "CLIP goes on as it is: the two models are released and taken back independently.",
            ),
            Chapter(
                "vlm-rollback", "An operator rolls the VLM alone back, then forward again",
                "An answer that is being written goes on with the release that it began with.",
            ),
        ]  # fmt: skip
    return [
        *plan,
        Chapter(
            "check", "Every answer is compared with the release that it was stamped with",
            "Engines that share nothing with the server but files say what each release must answer.",
        ),
    ]  # fmt: skip


class StoryProgress:
    """Tracks the current chapter. Safe to read from other threads."""

    def __init__(self, plan: Sequence[Chapter]) -> None:
        self.plan = tuple(plan)
        self.began = time.monotonic()

    @property
    def current(self) -> Chapter | None:
        return next((each for each in self.plan if each.began is not None and each.ended is None), None)

    def number(self, chapter: Chapter) -> int:
        """From 1."""
        return self.plan.index(chapter) + 1

    @contextmanager
    def chapter(self, name: str) -> Iterator[Chapter]:
        chapter = next(each for each in self.plan if each.name == name)
        chapter.began = time.monotonic()
        try:
            yield chapter
        finally:
            chapter.ended = time.monotonic()

    def seconds(self) -> dict[str, float]:
        return {each.name: each.seconds() for each in self.plan if each.began is not None}


class Screen:
    """Shows a story's progress. On a terminal it uses the whole screen until the end of the block.

    >>> with Screen(StoryProgress(plan), {"console": "http://127.0.0.1:8001"}) as screen:
    ...     with screen.chapter("start"):
    ...         progress_log.info("starting Ray ...")
    """

    def __init__(self, story: StoryProgress, links: dict[str, str], console: Console | None = None) -> None:
        self.story = story
        self.links = links
        self._console = console or Console(stderr=True)
        self._lines: deque[Text] = deque(maxlen=LINES)
        self._live: Live | None = None

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console, screen=True, get_renderable=self.render,
                refresh_per_second=REFRESHES_PER_SECOND,
            )  # fmt: skip
            self._live.start()
            send_to(self.add)
        else:
            for name, url in self.links.items():
                progress_log.info(f"{name}: {url}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is None:
            return
        send_to(None)
        self._live.stop()
        self._live = None
        if kind is not None:  # the screen is gone, and with it what led to the error
            for line in self._lines:
                self._console.print(line, highlight=False)

    def add(self, level: int, text: str) -> None:
        """Add a line of output."""
        self._lines.append(styled(level, text))

    @contextmanager
    def chapter(self, name: str) -> Iterator[None]:
        with self.story.chapter(name) as chapter:
            if self._live is None:
                self._console.rule(f"[bold]{self.story.number(chapter)}  {chapter.title}", align="left")
                progress_log.info(chapter.why)
            yield

    def run(self, command: Sequence[str]) -> None:
        """Run a command and show its output. Raises RatchetError when it fails."""
        shown: dict[str, Any] = {} if self._live is None else {
            "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace",
            "env": {**os.environ, "COLUMNS": str(self._console.width), "RATCHET_LOGS__FORMAT": "text"},
        }  # fmt: skip
        process = subprocess.Popen(reaped(command), stdin=subprocess.DEVNULL, start_new_session=True, **shown)
        try:
            for output in process.stdout or ():
                self.add(logging.INFO, _HEAD.sub("", output.rstrip()))
            status = process.wait()
        except BaseException:
            stop_reaped(process, STOP_SECONDS)
            raise
        finally:
            if process.stdout is not None:
                process.stdout.close()
        if status:
            raise RatchetError(f"`{' '.join(command[1:])}` ended with status {status}.", "Its last lines say why.")

    def render(self) -> RenderableType:
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(width=2)
        table.add_column(ratio=1)
        table.add_column(justify="right")
        for chapter in self.story.plan:
            table.add_row(*_row(self.story.number(chapter), chapter))
        current = self.story.current
        parts: list[RenderableType] = [self._head(), Panel(table, title="The story", title_align="left")]
        if current is not None:
            about = Text.assemble((f"{current.title}\n", "bold"), current.why)
            parts.append(Panel(about, title="What happens, and why it matters", title_align="left"))
        room = self._console.height - len(self.story.plan) - OTHER_LINES
        now = Text("\n", no_wrap=True, overflow="ellipsis").join(list(self._lines)[-max(room, LEAST_LINES) :])
        parts.append(Panel(now, title="Now", title_align="left"))
        return Group(*parts)

    def _head(self) -> Text:
        head = Text.assemble(("Ratchet demo  ", "bold"), clock(time.monotonic() - self.story.began))
        for name, url in self.links.items():
            head.append(f"   {name} ", "dim")
            head.append(url, f"link {url}")
        return head


def clock(seconds: float) -> str:
    """``3:07`` for 187 seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _row(number: int, chapter: Chapter) -> tuple[str, Text, str]:
    if chapter.began is None:
        return "", Text(f"{number}  {chapter.title}", "dim"), ""
    mark, style = ("[green]✓[/green]", "") if chapter.ended is not None else ("[yellow]▸[/yellow]", "bold")
    return mark, Text(f"{number}  {chapter.title}", style), clock(chapter.seconds())
