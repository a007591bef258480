"""A part of Ratchet as a process, started as users do, and its resource usage."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from core.addresses import free_port
from core.errors import RatchetError
from core.settings import Settings
from core.waiting import wait_until

_SECRETS: Final[Any] = {"origins": True, "access": True, "kafka": {"oauth", "schema_registry_auth"}}
_LINE = re.compile(r"^(\w+)(\{[^}]*\})? (\S+)$", re.MULTILINE)
SAMPLE_SECONDS = 0.05


def write_settings(settings: Settings, path: Path) -> Path:
    """A settings file for child processes; JSON is YAML. Secrets are not written."""
    path.write_text(settings.model_dump_json(exclude=_SECRETS, exclude_none=True))
    return path


class RatchetProcess:
    """``ratchet NAME``, which can be killed, stopped and started again.

    >>> with RatchetProcess("ingest", write_settings(settings, path), log) as worker: ...
    """

    def __init__(self, name: str, config: Path, log: Path, environment: Mapping[str, str] | None = None) -> None:
        """``log``: file for the output of every start. ``environment``: variables in addition to those of this
        process.
        """
        self.name = name
        self.config = config
        self.log = log
        self.environment = dict(environment or {})
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """True if its process lives (a stopped one does)."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it; it is not ready yet."""
        self.port = free_port()
        section = "maintain" if self.name == "maintain" else "ingest"
        flags = ["--config", str(self.config), "--set", f"{section}.metrics_port={self.port}"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RATCHET_")}
        environment |= self.environment
        with self.log.open("ab") as out:
            command = [sys.executable, "-m", "ops.cli.main", *flags, self.name]
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def stop(self, seconds: float = 60.0) -> bool:
        """Ask it to end; False when it had to be killed after ``seconds``, or ended with an error."""
        if self.process is None:
            return True
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds) == 0
        except subprocess.TimeoutExpired:
            self.kill()
            return False

    def __enter__(self) -> RatchetProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        """Wait until a condition holds. Raises RatchetError on timeout, or if the process ended."""
        wait_for(condition, what, seconds, lambda: self.running, f"See {self.log}.")

    def metrics(self) -> dict[str, float]:
        """Its metrics by name with labels; none while it does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=2) as answer:
                text = answer.read().decode()
        except OSError:
            return {}
        return {name + (labels or ""): float(value) for name, labels, value in _LINE.findall(text)}

    def lags(self) -> dict[str, float]:
        prefix = 'ratchet_ingest_lag_records{partition="'
        return {name[len(prefix) : -2]: value for name, value in self.metrics().items() if name.startswith(prefix)}

    def cpu_seconds(self) -> float:
        """CPU time so far of the process and its descendants: user and system, all threads."""
        return sum(map(_cpu_seconds, self._processes()))

    def memory(self, peak: bool = False) -> int:
        """Resident bytes of the process and its descendants: now, or the peak of each."""
        return sum(_memory(each, peak) for each in self._processes())

    def _processes(self) -> list[Path]:
        if self.process is None:
            raise RatchetError(f"ratchet {self.name} does not run.", "Start it.")
        family = [Path(f"/proc/{self.process.pid}")]
        for each in family:  # which grows meanwhile
            with suppress(FileNotFoundError):
                tasks = (task.read_text().split() for task in each.glob("task/*/children"))
                family += [Path(f"/proc/{number}") for numbers in tasks for number in numbers]
        return family


def _cpu_seconds(process: Path) -> float:
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = (process / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _memory(process: Path, peak: bool) -> int:
    with suppress(FileNotFoundError, ProcessLookupError):
        status = (process / "status").read_text()
        line = re.search(rf"^{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status, re.MULTILINE)
        return int(line.group(1)) * 1024 if line else 0
    return 0


def wait_for(
    condition: Callable[[], bool],
    what: str,
    seconds: float = 120.0,
    alive: Callable[[], bool] = lambda: True,
    fix: str = "Run it again on a machine that has less to do.",
) -> None:
    """Wait until a condition holds. Raises RatchetError on timeout, or when ``alive`` no longer holds."""
    if not wait_until(condition, seconds, pause=SAMPLE_SECONDS, alive=alive):
        if not alive():
            raise RatchetError(f"a process ended before {what}.", fix)
        raise RatchetError(f"{what} did not come within {seconds:.0f} s.", fix)
