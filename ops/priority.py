"""Niceness of processes and threads: what nobody waits for computes after what somebody waits for. It never goes back
up.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress


def nice_process(nice: int) -> None:
    """Lower this process's priority to at least ``nice``. Threads and processes that it starts later inherit that."""
    missing = nice - os.nice(0)
    if missing > 0:
        os.nice(missing)


def nice_thread(nice: int) -> None:
    """Lower this thread's priority to at least ``nice``. Linux only: elsewhere a priority is of a process."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, max(nice, os.getpriority(os.PRIO_PROCESS, thread)))
