"""A peer's server, suspended while it is not asked."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import httpx

from core.errors import RatchetError
from core.waiting import wait_until

START_SECONDS = 300.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.25


class PeerProcess:
    """Started, paused (SIGSTOP), resumed and ended as one process group."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path | None = None
    ) -> None:
        """``folder``: working directory; that of its log by default."""
        self.log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**os.environ, **environment}, start_new_session=True, cwd=folder or log.parent,
            )  # fmt: skip

    def wait_for(self, url: str) -> None:
        """Wait until a GET of ``url`` is answered 200. Raises RatchetError with the end of its log."""

        def answers() -> bool:
            try:
                return httpx.get(url, trust_env=False, timeout=5.0).status_code == 200
            except httpx.TransportError:
                return False

        if wait_until(answers, START_SECONDS, pause=POLL_SECONDS, alive=lambda: self._process.poll() is None):
            return
        tail = self.log.read_text(errors="replace")[-2000:]
        raise RatchetError(f"{self.log.stem} does not answer {url}: {tail}", f"Its log is {self.log}.")

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> None:
        self.resume()
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
