"""The trainer's process: settings of the C libraries, priority, signals, a lock per home, and work folders."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from core.errors import TrainingError
from core.priority import nice_process, nice_session
from core.progress import progress_log

QUIET_SECONDS = 60.0
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "PASSIVE",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""Read once by the C libraries, before Python runs.

glibc keeps freed memory: otherwise each step returns its activations to the kernel and pays for fresh, zeroed pages,
which was 40% of the time on two cores. OpenMP's threads sleep while they wait for each other: when they spin on a busy
server, one burns the time slice that the other needs, and a step took 7 s instead of 1.6. With a fixed work space
cuBLAS adds up in the same order each time.
"""


def use_environment() -> None:
    """Apply :data:`ENVIRONMENT`: unless it is set, this process starts again with it (same PID, same arguments)."""
    if sys.platform == "linux" and not all(name in os.environ for name in ENVIRONMENT):
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**ENVIRONMENT, **os.environ})  # noqa: S606


def be_nice() -> None:
    """Set this process's priority to the lowest, so that serving comes first. Parts run in their own sessions, so the
    session gets the same niceness."""
    nice_process(19)
    nice_session()


class UpdaterBusy(TrainingError):
    """Another updater runs in this home, and takes up what is recorded."""


@contextmanager
def only_one(home: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the trainer's lock of this home: two trainers would both continue the same unfinished update. Waits for
    another one to end, or raises UpdaterBusy. The kernel releases the lock of a killed process."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "updater.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UpdaterBusy(f"an updater works in {home}.", "It takes up what is recorded by itself.") from None
            progress_log.info(f"another updater works in {home}; waiting for it to end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def work_folders(home: Path) -> list[Path]:
    """Work folders of this machine (checkpoints, measured costs, prepared shards), named by update ID. A killed process
    may leave one."""
    return sorted(path for path in (home / "updates").glob("*") if path.is_dir())


class StopSignal:
    """SIGTERM and SIGINT: in training, a request to stop after this step; otherwise exit at once, as every other point
    can be repeated."""

    def __init__(self) -> None:
        self.wanted = False
        self._training = False

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def __call__(self) -> bool:
        return self.wanted

    @contextmanager
    def training(self) -> Iterator[None]:
        self._training = True
        try:
            yield
        finally:
            self._training = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._training or self.wanted:
            signal.signal(number, signal.SIG_IGN)  # a second signal would interrupt the exit handlers
            raise SystemExit(128 + number if number == signal.SIGINT else 0)
        self.wanted = True


class ThrottledLog:
    """Logs why the updater waits: when the reason changes, and otherwise once a minute. Changes of figures alone do not
    count."""

    def __init__(self) -> None:
        self._last_kind, self._last_time = "", 0.0

    def say(self, reason: str) -> None:
        kind = re.sub(r"\d[\d.,]*", "", reason)
        if kind != self._last_kind or time.monotonic() - self._last_time > QUIET_SECONDS:
            progress_log.info(f"updater waits: {reason}")
            self._last_kind, self._last_time = kind, time.monotonic()
