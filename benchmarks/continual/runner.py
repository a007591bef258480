"""Runs units in processes, one per core, and reports progress."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol as Interface

from benchmarks.continual.chain import Unit, updates_done
from benchmarks.continual.own_data import OwnData
from benchmarks.continual.protocol import Protocol
from benchmarks.continual.worker import ASSIGNMENTS, FAILED, Assignment
from core.progress import progress_log
from updater.service.process import ENVIRONMENT
from updater.training.checkpoint import read_json, write_json

POLL_SECONDS = 2.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Process(Interface):
    """A worker, here or on another machine; as :class:`subprocess.Popen`."""

    returncode: int

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


Start = Callable[[Sequence[str], Mapping[str, str], Path], Process]
"""Starts a command with these variables added to the environment, and its output appended to a file."""


def here(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
    with log.open("ab") as file:
        return subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


@dataclass
class Job:
    """A unit in a process."""

    unit: Unit
    process: Process
    seen: int


@dataclass
class Runner:
    """``deadline``: monotonic second after which running units are asked to stop, and no others are started."""

    home: Path
    base: str
    results: Path
    protocol: Protocol
    updates: int
    jobs: int
    deadline: float = float("inf")
    data: OwnData | None = None
    start: Start = here
    _began: float = field(default_factory=time.monotonic)
    _finished: int = 0

    def run(self, units: Sequence[Unit]) -> bool:
        """Run the missing updates of these units. Returns whether all were tried; the reasons of failed units
        are kept.
        """
        waiting = [unit for unit in units if self.done(unit) < self.updates]
        running: list[Job] = []
        try:
            while waiting or running:
                late = time.monotonic() > self.deadline
                while waiting and len(running) < self.jobs and not late:
                    running.append(self._start(waiting.pop(0)))
                if late:
                    self._stop(running)
                    return False
                time.sleep(POLL_SECONDS)
                for job in list(running):
                    ended = job.process.poll() is not None
                    self._look(job, waiting, running)
                    if ended:
                        running.remove(job)
                        self._end(job)
        except BaseException:
            self._stop(running)
            raise
        return True

    def done(self, unit: Unit) -> int:
        return len(updates_done(self.results, unit.recipe, unit))

    def _start(self, unit: Unit) -> Job:
        folder = unit.folder(self.results)
        folder.mkdir(parents=True, exist_ok=True)
        task = Assignment(self.home, self.base, self.results, unit, self.updates, self.protocol, self.data)
        command = [sys.executable, "-m", "benchmarks.continual.worker", ASSIGNMENTS.dump_json(task).decode()]
        process = self.start(command, {**ENVIRONMENT, **ONE_THREAD}, folder / "log.txt")
        return Job(unit, process, self.done(unit))

    def _look(self, job: Job, waiting: Sequence[Unit], running: Sequence[Job]) -> None:
        done = self.done(job.unit)
        if done > job.seen:
            self._finished += done - job.seen
            job.seen = done
            left = sum(self.updates - self.done(unit) for unit in (*waiting, *(each.unit for each in running)))
            each = (time.monotonic() - self._began) / self._finished
            progress_log.info(
                f"{job.unit}: {done} of {self.updates} updates; {left} updates left, about {_spoken(left * each)}"
            )

    def _end(self, job: Job) -> None:
        path = job.unit.folder(self.results) / FAILED
        if job.process.returncode and not path.is_file():
            code = job.process.returncode
            reason = f"its process was killed by signal {-code}" if code < 0 else f"its process ended with {code}"
            write_json(path, {"reason": f"{reason}; see log.txt in this folder"})
        if path.is_file():
            progress_log.info(f"{job.unit} failed: {failure(self.results, job.unit)}")

    def _stop(self, running: Sequence[Job]) -> None:
        for job in running:
            if job.process.poll() is None:
                job.process.terminate()
        for job in running:
            job.process.wait()


def failure(results: Path, unit: Unit) -> str:
    """The reason of a unit's failure; empty if it did not fail."""
    record = read_json(unit.folder(results) / FAILED)
    return str(record.get("reason", "")) if isinstance(record, dict) else ""


def best(scores: Callable[[str], float | None], methods: Sequence[str], count: int) -> list[str]:
    """Names of the methods with the highest scores; those without one are left out."""
    known = {name: score for name in methods if (score := scores(name)) is not None}
    return sorted(known, key=lambda name: -known[name])[:count]


def _spoken(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
