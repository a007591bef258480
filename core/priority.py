"""Giving way: work that no one waits for computes after work that someone waits for, and freed memory goes back to the
system. A niceness never goes back up.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

_pace = threading.local()


def nice_process(nice: int) -> None:
    """Lower this process's priority to at least ``nice``. Threads and processes that it starts later inherit that."""
    missing = nice - os.nice(0)
    if missing > 0:
        os.nice(missing)


def nice_session() -> None:
    """Give the session of this process the niceness of this process, where it leads it.

    Where Linux schedules by session (``sched_autogroup_enabled``), niceness counts only among the processes of one
    session: see sched(7).
    """
    group = Path("/proc/self/autogroup")
    if os.getsid(0) == os.getpid() and group.exists():  # not the session of the shell that it was started from
        with suppress(OSError):  # a kernel that takes no niceness here has no groups either
            group.write_text(str(os.nice(0)))


def nice_thread(nice: int) -> None:
    """Lower this thread's priority to at least ``nice``. Linux only: elsewhere a priority is of a process."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(nice, os.getpriority(os.PRIO_PROCESS, thread)))


def idle_thread() -> None:
    """Let this thread compute only while nothing else does (Linux's SCHED_IDLE; elsewhere it keeps its priority). The
    threads and processes that it starts inherit that, and none of them can go back.

    A nice thread still ends its time slice, some milliseconds, when another one wakes up, and its core counts as busy
    when Linux looks for one that is not. A request wakes up a dozen threads in turn.
    """
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def pace_thread(share: float, gives_way: Callable[[], bool]) -> None:
    """Let this thread compute for at most ``share`` (0 to 1) of the time while ``gives_way()`` holds; it sleeps in
    :func:`breathe`.

    Priority alone gives way on a core, and not in the caches and the bandwidth of the memory, which all cores share.
    """
    _pace.rest, _pace.gives_way, _pace.since = 1 / share - 1, gives_way, time.thread_time()


def yield_cpu() -> None:
    """Call between the parts of long work: sleeps in proportion to what was computed since the last call, on a thread
    that called :func:`pace_thread`. Does nothing on any other.
    """
    rest = getattr(_pace, "rest", 0.0)
    if not rest:
        return
    computed = time.thread_time() - _pace.since
    if _pace.gives_way():
        time.sleep(rest * computed)
    _pace.since += computed


def return_free_memory() -> None:
    """Give the system the pages that hold nothing any more, in the middle of the heap, too (glibc's malloc_trim(3);
    elsewhere nothing happens). Takes some milliseconds.

    Weights of adapters that come and go leave holes that others do not fit into: a process with three of them resident
    came to hold 25% more than it needed.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
