"""Child processes that are restarted when they end by themselves, and stopped in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ops.log_format import readable
from ops.progress import say

STOP_SECONDS = 40.0  # Serve drains its requests, ingest finishes its batch, the trainer writes a checkpoint
BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass
class ChildProcess:
    """One child process, restarted when it ends by itself."""

    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    retry_at: float = 0.0
    _file: IO[bytes] | None = None

    def start(self) -> None:
        """Start the process in a group of its own, so that a Ctrl-C reaches the supervisor alone."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self._file is None:
            self._file = self.log.open("ab")
        self.process = subprocess.Popen(
            self.command, stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self.process is not None and self.process.poll() is None

    def tend(self, now: float) -> None:
        """Start it again if it ended, later each time."""
        if self.running or now < self.retry_at:
            return
        if self.process is not None and self.retry_at <= 0:
            wait = BACKOFF_SECONDS[min(self.restarts, len(BACKOFF_SECONDS) - 1)]
            self.retry_at = now + wait
            say(
                f"[yellow]{self.name} ended with status {self.process.returncode}[/yellow]; "
                f"again in {wait:.0f} s ({self.log})"
            )
            return
        self.restarts += 1
        self.retry_at = 0.0
        self.start()

    def signal(self, number: int) -> None:
        """Send a signal to the process (not to its children: it ends them itself)."""
        if self.process is not None and self.running:
            self.process.send_signal(number)

    def stop(self, deadline: float) -> None:
        """Ask it to end, wait until ``deadline`` (monotonic seconds), then end its whole group."""
        if self.process is None:
            return
        self.signal(signal.SIGTERM)
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
            say(f"{self.name} stopped")
        except subprocess.TimeoutExpired:
            say(f"[yellow]{self.name} did not stop in time and is killed[/yellow]")
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self._file is not None:
            self._file.close()
            self._file = None


def ratchet_command(*words: str, file: Path | None = None, flags: Sequence[str] = ()) -> list[str]:
    """The command line that runs ``ratchet`` with ``words`` in a child process.

    Args:
        file: settings file, as ``--config``.
        flags: settings, ``NAME=VALUE`` each, as ``--set``.
    """
    head = [sys.executable, "-m", "ops.cli.main"]
    if file is not None:
        head += ["--config", str(file)]
    for flag in flags:
        head += ["--set", flag]
    return [*head, *words]


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, as text."""
    if not path.exists():
        return "(no log)"
    return "\n".join(map(readable, path.read_text(errors="replace").splitlines()[-lines:]))
