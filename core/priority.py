"""Process and thread priorities for background work, and returning freed memory. A niceness never goes back up."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

SPIN_COUNT = "5000"
"""Of ``GOMP_SPINCOUNT``: spins of a GNU OpenMP thread before it sleeps (default: 300,000); set it before torch is
imported. When an encoder's two threads share a core, a spinning one uses up its time slice while the other waits: an
image took 1.25 s instead of 0.013 s. With this value it takes 0.05 s, and alone still 0.013 s (0.03 s with
OMP_WAIT_POLICY=PASSIVE)."""
_pace = threading.local()


def nice_process(nice: int) -> None:
    """Lower this process's priority to at least ``nice``; later threads and processes inherit it."""
    missing = nice - os.nice(0)
    if missing > 0:
        os.nice(missing)


def nice_session() -> None:
    """Give this process's session its niceness, if it is the leader. With Linux's ``sched_autogroup_enabled`` niceness
    only counts among the processes of one session: see sched(7)."""
    group = Path("/proc/self/autogroup")
    if os.getsid(0) == os.getpid() and group.exists():  # not in the session of the shell that started it
        with suppress(OSError):  # a kernel that rejects a niceness here has no groups either
            group.write_text(str(os.nice(0)))


def nice_thread(nice: int) -> None:
    """Lower this thread's priority to at least ``nice``. Linux only: elsewhere priorities belong to processes."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(nice, os.getpriority(os.PRIO_PROCESS, thread)))


def idle_thread() -> None:
    """Let this thread compute only while nothing else does (Linux's SCHED_IDLE; elsewhere no effect). Threads and
    processes that it starts inherit that, permanently. A nice thread still finishes its time slice, some milliseconds,
    when another wakes up, and its core counts as busy when Linux looks for an idle one. A request wakes up a dozen
    threads in turn."""
    if hasattr(os, "SCHED_IDLE"):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def pace_thread(share: float, gives_way: Callable[[], bool]) -> None:
    """Limit this thread to ``share`` (0 to 1) of the time while ``gives_way()`` is true; it sleeps in
    :func:`yield_cpu`. Priority alone does not share out the caches and memory bandwidth, which all cores use."""
    _pace.rest, _pace.gives_way, _pace.since = 1 / share - 1, gives_way, time.thread_time()


def yield_cpu() -> None:
    """Sleep in proportion to the CPU time since the last call, on a thread that called :func:`pace_thread`; no effect
    on others. Call it between parts of long work."""
    rest = getattr(_pace, "rest", 0.0)
    if not rest:
        return
    computed = time.thread_time() - _pace.since
    if _pace.gives_way():
        time.sleep(rest * computed)
    _pace.since += computed


def return_free_memory() -> None:
    """Return free heap pages to the system (glibc's malloc_trim(3); elsewhere no effect). Takes some milliseconds.
    Loading and unloading adapters fragments the heap: a process with three resident adapters held 25% more than it
    needed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
