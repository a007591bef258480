"""Starts the parts on one machine, keeps them running, and stops them in order."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ops.cli.checks import answers
from ops.cli.context import Context
from ops.errors import RatchetError
from ops.ledger.rows import Family
from ops.progress import say

if TYPE_CHECKING:
    from serving.start_progress import StartProgress

STOP_SECONDS = 40.0  # Serve drains its requests, ingest finishes its batch, the trainer writes a checkpoint
READY_SECONDS = 900.0  # serve gives up by itself and says why: leave it the time, also on a machine that is busy
BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass
class Part:
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


class Supervisor:
    """The parts of one Ratchet on one machine.

    >>> with Supervisor(context, ["broker", "serve", "ingest"]) as parts: ...
    """

    ORDER = ("broker", "serve", "ingest", "maintain", "update", "console")

    def __init__(self, context: Context, names: list[str]) -> None:
        settings = context.settings
        logs = settings.home / "logs"
        own_broker = "broker" in names and not answers(settings.kafka.bootstrap.split(",")[0])
        self.settings = settings
        self.parts = [
            Part(name, context.command(name), logs / f"{name}.log")
            for name in self.ORDER
            if name in names and (name != "broker" or own_broker)
        ]

    def __enter__(self) -> Supervisor:
        for part in self.parts:
            part.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def part(self, name: str) -> Part:
        """One part by name."""
        return next(part for part in self.parts if part.name == name)

    def tend(self) -> None:
        """Restart what ended. Call about once a second."""
        now = time.monotonic()
        for part in self.parts:
            part.tend(now)

    def wait_until_ready(self, model: Family = "vlm", timeout: float = READY_SECONDS) -> StartProgress:
        """Wait until the server answers for a model (``vlm``: for every model that it serves), and say how far it is.
        Returns the progress, which goes on where another model is still starting.

        Raises:
            RatchetError: a part ended instead, with the end of its log; or it took longer than ``timeout`` seconds.
        """
        from serving.app import serves_vlm
        from serving.client import Client
        from serving.start_progress import StartProgress

        models: tuple[Family, ...] = ("clip", "vlm") if serves_vlm(self.settings) else ("clip",)
        progress = StartProgress(Client(self.settings.serve.url), models)
        for wanted in models[: 1 + (model == "vlm")]:
            progress.wait_for(wanted, timeout, self._check_parts)
        return progress

    def _check_parts(self) -> None:
        for part in self.parts:
            if not part.running:
                raise RatchetError(f"{part.name} ended while starting:\n{tail(part.log)}", f"The whole log: {part.log}")

    def stop(self) -> None:
        """Stop the parts: readers of the log first, the broker last; one deadline for all."""
        deadline = time.monotonic() + STOP_SECONDS
        for part in reversed(self.parts):
            if part.name != "broker":
                part.signal(signal.SIGTERM)
        for part in reversed(self.parts):
            part.stop(deadline)


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else "(no log)"
