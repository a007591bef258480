"""Tasks over all cores: a thousand verdicts take minutes on one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from core.child_process import end_with_parent, kill_workers

T = TypeVar("T")
R = TypeVar("R")


def in_processes(
    call: Callable[[T], R],
    tasks: Sequence[T],
    *,
    workers: int | None = None,
    few: int = 1,
    prepare: Callable[[], object] | None = None,
) -> Iterator[R]:
    """Results of the tasks, in their order. Everything must be picklable.

    Args:
        workers: processes; None: as many as there are cores. With one, the tasks are done in this process.
        few: so many tasks are done in this process, before others would have started.
        prepare: called once in each process, before its first task.
    """
    count = workers or len(os.sched_getaffinity(0))
    if count == 1 or len(tasks) <= few:
        _prepare(prepare)
        yield from map(call, tasks)
        return
    with ProcessPoolExecutor(count, get_context("spawn"), initializer=_begin, initargs=(prepare,)) as pool:
        try:
            yield from pool.map(call, tasks)
        except BaseException:  # the end of the block would wait for all tasks
            kill_workers(pool)
            raise


def _begin(prepare: Callable[[], object] | None) -> None:
    end_with_parent()
    _prepare(prepare)


def _prepare(prepare: Callable[[], object] | None) -> None:
    if prepare is not None:
        prepare()
