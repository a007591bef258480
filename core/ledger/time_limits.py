"""Time limits of ledger calls, as a deadline of the thread that makes one.

A server that is stopped (SIGSTOP, a frozen virtual machine) keeps its connections open: the kernel acknowledges every
packet and no timeout of the server or of TCP ends the wait. The client has to count by itself.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

CALL_SECONDS: Final = 5.0
"""Longest time of one transaction on PostgreSQL, from the request for a connection to the end of COMMIT."""
CHECKOUT_SECONDS: Final = 2.0
"""Part of :data:`CALL_SECONDS` in which a pooled connection is got and probed; a new one may take 2 s more (libpq's
least connect_timeout)."""
MIGRATION_SECONDS: Final = 300.0
"""Longest time of a migration, waiting for that of another process included."""


class _Deadline(threading.local):
    value = math.inf


_deadline = _Deadline()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let database calls of this thread inside the block end after ``seconds``; an earlier outer limit stays."""
    before = _deadline.value
    _deadline.value = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.value = before


def seconds_left() -> float:
    """Time until the limit of this thread; negative when it has passed, infinite without one."""
    return _deadline.value - time.monotonic()
