"""Finds processes of a command that still run, by an environment variable that they all inherit."""

from __future__ import annotations

import contextlib
import fcntl
import signal
import termios
import uuid
from collections.abc import Mapping

import psutil

VARIABLE = "STARTED_BELOW"


def mark() -> dict[str, str]:
    return {VARIABLE: uuid.uuid4().hex}


def left_running(mark: Mapping[str, str]) -> list[psutil.Process]:
    """Find processes that inherited the mark, besides this one and those that started it."""
    found = []
    own = psutil.Process()
    known = {own.pid, *(parent.pid for parent in own.parents())}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            running = process.pid not in known and process.status() != psutil.STATUS_ZOMBIE
            if running and mark.items() <= process.environ().items():
                found.append(process)
    return found


def take_terminal() -> None:
    """Make standard input the terminal of a child that leads a new session, so that it gets SIGHUP at its end. Restores
    signals that a shell makes background commands ignore.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
