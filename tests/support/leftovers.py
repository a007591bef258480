"""Finds what still runs of a command: its processes inherited a variable of the environment, wherever they went."""

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
    """A variable for the environment of a command, unlike any other."""
    return {VARIABLE: uuid.uuid4().hex}


def left_running(mark: Mapping[str, str], text: str = "") -> list[psutil.Process]:
    """Processes that inherited the mark or, with a ``text``, have it in their command line: a title that a process
    gives itself may be written over its environment.
    """
    found = []
    own = psutil.Process()
    known = {own.pid, *(parent.pid for parent in own.parents())}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid in known or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if (text and text in " ".join(process.cmdline())) or mark.items() <= process.environ().items():
                found.append(process)
    return found


def take_terminal() -> None:
    """In a child that leads a new session: its standard input becomes its terminal, whose end it gets as SIGHUP. It
    takes the signals that a shell makes a command in the background ignore.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
