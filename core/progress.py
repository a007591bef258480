"""Progress of long work: a bar on a terminal, a log record every five seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.errors import MarkupError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from core.log_format import writes_json

log = logging.getLogger("ratchet.progress")
T = TypeVar("T")
EVERY_SECONDS = 5.0
_console = Console(stderr=True)
_receiver: Callable[[str], None] | None = None


def send_to(receiver: Callable[[str], None] | None) -> None:
    """Send lines to ``receiver`` instead of standard error, as when it owns the screen, or is in another process. None:
    undo. Terminal bars become lines too."""
    global _receiver
    _receiver = receiver


def _on_terminal() -> bool:
    return _receiver is None and sys.stderr.isatty() and not writes_json()


def say(message: str) -> None:
    """Write a line (Rich's markup) to standard error: with the time (UTC) at a terminal, elsewhere as a log record: red
    as an error, yellow as a warning, other text as information."""
    if _receiver is not None:
        _receiver(message)
    elif _on_terminal():
        shown = f"[dim]{time.strftime('%H:%M:%S', time.gmtime())}[/dim] {message}"
        _console.print(shown, highlight=False, soft_wrap=True)
    else:
        try:
            text = Text.from_markup(message)
        except MarkupError:  # brackets in external text
            text = Text(message)
        styles = {str(span.style) for span in text.spans}
        level = logging.ERROR if "red" in styles else logging.WARNING if "yellow" in styles else logging.INFO
        log.log(level, "%s", text.plain)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield ``items`` while showing progress."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    if _on_terminal():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, Remaining(), console=_console, transient=True) as bar:
            yield from bar.track(items, description=label, total=total)
        return
    started = last = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= EVERY_SECONDS:
            last = now
            say(f"{label}: {done}{f'/{total}' if total else ''} after {now - started:.0f} s")


@contextmanager
def meter(label: str) -> Iterator[Callable[[Callable[[], str]], None]]:
    """Show progress of work of unknown length: yields a function that displays its argument's text at intervals."""
    terminal = _on_terminal()
    every = 0.2 if terminal else EVERY_SECONDS
    status = _console.status(f"{label} ...") if terminal else None
    last = time.monotonic()

    def show(text: Callable[[], str]) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < every:
            return
        last = now
        if status is not None:
            status.update(f"{label}: {text()}")
        else:
            say(f"{label}: {text()}")

    with status or nullcontext():
        yield show


@contextmanager
def step(label: str) -> Iterator[None]:
    started = time.monotonic()
    say(f"{label} ...")
    try:
        yield
    except BaseException:
        say(f"{label}: [red]failed[/red] after {time.monotonic() - started:.1f} s")
        raise
    say(f"{label}: done in {time.monotonic() - started:.1f} s")
