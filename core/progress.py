"""Progress of long work: a bar on a terminal, a log record every five seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining
from rich.text import Text

from core.log_format import writes_json

T = TypeVar("T")
Receiver = Callable[[int, str], None]
"""Called with the level and the text of each record."""
EVERY_SECONDS = 5.0
progress_log = logging.getLogger("ratchet.progress")
"""Lines about long work. At a terminal they are shown with the time (UTC), elsewhere they are records of the log."""
_console = Console(stderr=True)
_receiver: Receiver | None = None


def send_to(receiver: Receiver | None) -> None:
    """Send records to ``receiver`` alone, as when it owns the screen, or is in another process. None: undo. Terminal
    bars become records too."""
    global _receiver
    _receiver = receiver


def styled(level: int, text: str) -> Text:
    """A record for a terminal: the time, and the text in the level's colour."""
    style = "red" if level >= logging.ERROR else "yellow" if level >= logging.WARNING else ""
    return Text.assemble((time.strftime("%H:%M:%S ", time.gmtime()), "dim"), (text, style))


def _on_terminal() -> bool:
    return _receiver is None and sys.stderr.isatty() and not writes_json()


def _left_to_the_log(record: logging.LogRecord) -> bool:
    if _receiver is not None:
        _receiver(record.levelno, record.getMessage())
    elif _on_terminal():
        _console.print(styled(record.levelno, record.getMessage()), highlight=False, soft_wrap=True)
    else:
        return True
    return False


progress_log.addFilter(_left_to_the_log)


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
            progress_log.info(f"{label}: {done}{f'/{total}' if total else ''} after {now - started:.0f} s")


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
            progress_log.info(f"{label}: {text()}")

    with status or nullcontext():
        yield show


@contextmanager
def step(label: str) -> Iterator[None]:
    started = time.monotonic()
    progress_log.info(f"{label} ...")
    try:
        yield
    except BaseException:
        progress_log.error(f"{label}: failed after {time.monotonic() - started:.1f} s")
        raise
    progress_log.info(f"{label}: done in {time.monotonic() - started:.1f} s")
