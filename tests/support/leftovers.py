"""Finds what still runs of a command: its processes inherited a variable of the environment, wherever they went."""

from __future__ import annotations

import contextlib
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
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if (text and text in " ".join(process.cmdline())) or mark.items() <= process.environ().items():
                found.append(process)
    return found
