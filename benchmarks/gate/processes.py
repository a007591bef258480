"""Tasks over all cores: a thousand verdicts take minutes on one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from core.child_process import end_with_parent, kill_workers

FEW = 30
"""So many tasks are done before the processes would have started."""
T = TypeVar("T")


def in_processes(tasks: Sequence[Callable[[], list[T]]]) -> Iterator[T]:
    """What the tasks return, in their order. They must be picklable."""
    cores = len(os.sched_getaffinity(0))
    if cores == 1 or len(tasks) <= FEW:
        for task in tasks:
            yield from task()
        return
    with ProcessPoolExecutor(cores, get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            for found in pool.map(_call, tasks):
                yield from found
        except BaseException:  # the end of the block would wait for all tasks
            kill_workers(pool)
            raise


def _call(task: Callable[[], list[T]]) -> list[T]:
    return task()
