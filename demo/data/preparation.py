"""Prepares demo data in child processes, in the background."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Final

from core.child_process import end_with_parent, kill_workers
from core.errors import ConfigError
from core.priority import nice_process, nice_session
from core.progress import progress_log, send_to
from demo.data.domain import current
from demo.data.domains import DOMAINS, prepare_domain
from demo.data.questions import QUESTIONS, prepare_questions
from demo.data.questions import VERSION as QUESTIONS_VERSION

NICE: Final = 10


@dataclass(frozen=True, slots=True)
class DemoData:
    name: str
    split: str | None = None

    def ready(self, home: Path) -> bool:
        version = QUESTIONS_VERSION if self.name in QUESTIONS else None
        return current(home / "data" / self.name, version, self.split)

    def prepare(self, home: Path) -> Path:
        """Make it in this process. Raises `ConfigError` for an unknown name, `PackageError`."""
        if self.name in QUESTIONS:
            return prepare_questions(self.name, home)
        return prepare_domain(self.name, home, self.split)


def merged(wanted: Iterable[DemoData]) -> list[DemoData]:
    """Each name once, in order of first mention; the whole if several splits are wanted. Questions come last, after the
    domains of their pictures, which are drawn in parallel."""
    splits: dict[str, str | None] = {}
    wanted = list(wanted)
    domains = [each for each in wanted if each.name not in QUESTIONS]
    questions = dict.fromkeys(each.name for each in wanted if each.name in QUESTIONS)
    sources = [DemoData(source) for name in questions for source in QUESTIONS[name].sources]
    for each in [*domains, *sources]:
        splits[each.name] = each.split if splits.setdefault(each.name, each.split) == each.split else None
    return [*(DemoData(name, split) for name, split in splits.items()), *(DemoData(name) for name in questions)]


class Preparation:
    """Prepares data sets in the given order, one per core at a time. Starts no process if nothing is missing.

    >>> with Preparation([DemoData("fluent3d"), DemoData("openclipart", "test")], home) as data:
    ...     data.wait("fluent3d")      # goes on with the others
    ...     data.wait_for_all()
    """

    def __init__(self, wanted: Iterable[DemoData], home: Path, processes: int = 0) -> None:
        """``processes``: maximum at a time; 0: one per core. Raises ConfigError for an unknown name."""
        data = merged(wanted)
        for each in data:
            if each.name not in DOMAINS and each.name not in QUESTIONS:
                raise ConfigError(f"there is no demo data {each.name!r}.", "`ratchet demo data list` shows all.")
        missing = [each for each in data if not each.ready(home)]
        self._jobs: dict[str, Future[Path]] = {}
        self._pool: ProcessPoolExecutor | None = None
        if not missing:
            return
        context = multiprocessing.get_context("spawn")  # a fork would copy locks held by this process's threads
        self._lines: SimpleQueue[tuple[int, str] | None] = context.SimpleQueue()
        self._reader = Thread(target=self._show, name="demo-data", daemon=True)
        self._reader.start()
        count = min(processes or len(os.sched_getaffinity(0)), len(missing))
        self._pool = ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=(self._lines,))
        self._jobs = {each.name: self._pool.submit(each.prepare, home) for each in missing}

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            if kind is not None:  # its data is not needed, and Ctrl-C does not reach the workers
                kill_workers(self._pool)
            else:
                self._pool.shutdown(wait=True)
                self._lines.put(None)  # a killed worker may hold the queue
                self._reader.join()
            self._pool = None

    def wait(self, *names: str) -> None:
        """Wait until these are prepared. Raises what preparing one of them raised."""
        for name in names:
            if name in self._jobs:
                self._jobs[name].result()

    def wait_for_all(self) -> None:
        self.wait(*self._jobs)

    def _show(self) -> None:
        while (record := self._lines.get()) is not None:
            progress_log.log(*record)


def _begin(lines: SimpleQueue[tuple[int, str] | None]) -> None:
    """In each process: lower the priority, and send output to the parent."""
    os.setsid()
    end_with_parent()
    nice_process(NICE)
    nice_session()
    progress_log.setLevel(logging.INFO)
    send_to(lambda *record: lines.put(record))
