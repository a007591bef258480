"""Child processes that end with this one, restart after a crash, and stop in bounded time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from core.log_format import readable
from core.progress import progress_log
from core.reaper import descendants

STOP_SECONDS = 40.0  # Serve drains its requests, ingest finishes its batch, the trainer writes a checkpoint
KILL_SECONDS = 20.0
"""Longest wait for a kill; the reaper itself gives up earlier."""
BACKOFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)


def reaped(command: Sequence[str]) -> list[str]:
    """The command line that runs a command under :mod:`core.reaper`: all its processes end with it, and with this
    process, however that ends."""
    reaper = str(Path(__file__).with_name("reaper.py"))
    return [sys.executable, "-S", "-E", reaper, str(os.getpid()), str(STOP_SECONDS), *command]


def stop_reaped(process: subprocess.Popen[bytes] | subprocess.Popen[str], seconds: float = STOP_SECONDS) -> bool:
    """Ask a :func:`reaped` process to end, and kill it after ``seconds``. Returns whether it ended as asked."""
    process.terminate()
    try:
        process.wait(max(0.1, seconds))
        return True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGQUIT)
    try:
        process.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return False


def end_with_parent() -> None:
    """Exit this multiprocessing worker as soon as its parent is gone, even if killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end-with-parent", daemon=True).start()


def processor_seconds(root: int) -> float:
    """CPU seconds of a process and its living descendants. 0 without /proc."""
    return sum(map(own_processor_seconds, [root, *descendants(root)])) if sys.platform == "linux" else 0.0


def own_processor_seconds(pid: int) -> float:
    """CPU seconds of a process alone; 0 if it has ended. Needs /proc."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def kill_workers(pool: ProcessPoolExecutor) -> None:
    """Kill the processes of a pool immediately; the pool itself would finish all of its work."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.join()


@dataclass
class ChildProcess:
    name: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    retry_at: float = 0.0
    _file: IO[bytes] | None = None

    def start(self) -> None:
        """Start the process in its own session, so that Ctrl-C only reaches the supervisor."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if self._file is None:
            self._file = self.log.open("ab")
        self.process = subprocess.Popen(
            reaped(self.command), stdout=self._file, stderr=subprocess.STDOUT, start_new_session=True,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def restart_dead(self, now: float) -> None:
        if self.running or now < self.retry_at:
            return
        if self.process is not None and self.retry_at <= 0:
            wait = BACKOFF_SECONDS[min(self.restarts, len(BACKOFF_SECONDS) - 1)]
            self.retry_at = now + wait
            progress_log.warning(
                f"{self.name} ended with status {self.process.returncode}; again in {wait:.0f} s ({self.log})"
            )
            return
        self.restarts += 1
        self.retry_at = 0.0
        self.start()

    def ask(self) -> None:
        if self.process is not None and self.running:
            self.process.terminate()

    def stop(self, deadline: float) -> None:
        """Ask it to end, wait until ``deadline`` (monotonic seconds), then kill all of its processes."""
        if self.process is None:
            return
        if stop_reaped(self.process, deadline - time.monotonic()):
            progress_log.info(f"{self.name} stopped")
        else:
            progress_log.warning(f"{self.name} did not stop in time and is killed")
        if self._file is not None:
            self._file.close()
            self._file = None


def ratchet_command(*words: str, file: Path | None = None, flags: Sequence[str] = ()) -> list[str]:
    """The command line that runs ``ratchet`` with ``words``, ``--config`` ``file`` and each of ``flags``
    (``NAME=VALUE``) as ``--set``."""
    head = [sys.executable, "-m", "ops.cli.main"]
    if file is not None:
        head += ["--config", str(file)]
    for flag in flags:
        head += ["--set", flag]
    return [*head, *words]


def tail(path: Path, lines: int = 15) -> str:
    if not path.exists():
        return "(no log)"
    return "\n".join(map(readable, path.read_text(errors="replace").splitlines()[-lines:]))
