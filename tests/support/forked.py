"""Processes that tests kill, stop and continue, forked from one that has imported their code.

A new Python takes seconds to import Lance, torch and transformers; the fork of a process that has done so takes
milliseconds. That process, multiprocessing's fork server, only imports and forks, so a child inherits no threads or
locks of others. It is otherwise an ordinary process: SIGKILL leaves it no time.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from core.logs import configure_logging
from tests.support.kafka import wait_for

_context = multiprocessing.get_context("forkserver")
_imported = ["pytest"]


def import_ahead(*modules: str) -> None:
    """Let the fork server import these as well; call it before the first :class:`ForkedProcess`."""
    _imported.extend(modules)
    _context.set_forkserver_preload(_imported)


class ForkedProcess:
    """A function in its own process, with its output in a file. Functions are pickled by name."""

    def __init__(self, log: Path, function: Callable[..., object], *arguments: Any) -> None:
        self.log = log
        self._process = _context.Process(target=_run, args=(log, function, arguments))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, the negative number of the signal that ended it, or None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        self._process.join(seconds)
        code = self.poll()
        assert code is not None, f"it runs after {seconds:.0f} s:\n{self.output()}"
        return code

    def wait_until_stopped(self) -> None:
        process = psutil.Process(self.pid)

        def stopped() -> bool:
            assert self.poll() is None, self.output()
            return bool(process.status() == psutil.STATUS_STOPPED)

        wait_for(stopped, "its stop")

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def output(self) -> str:
        return self.log.read_text()[-4000:] if self.log.exists() else ""


def _run(log: Path, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    configure_logging()
    function(*arguments)


@atexit.register
def _kill_those_left() -> None:
    """Otherwise multiprocessing would wait for ever for stopped children of a failed test when the tests end."""
    for process in multiprocessing.active_children():
        process.kill()
