"""Time limits of ledger calls, as a deadline of the calling thread. A stopped server (SIGSTOP, a frozen virtual
machine) keeps its connections open: the kernel acknowledges every packet and no timeout of the server or of TCP ends
the wait. So the client enforces the limit."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

CALL_SECONDS: Final = 5.0
"""Limit on a PostgreSQL transaction, from the connection request to the end of COMMIT."""
CHECKOUT_SECONDS: Final = 2.0
"""Part of :data:`CALL_SECONDS` for getting and probing a pooled connection; a new one may take 2 s more (libpq's
minimum connect_timeout)."""
MIGRATION_SECONDS: Final = 300.0
"""Limit on a migration, including the wait for another process's."""


class _Deadline(threading.local):
    value = math.inf


_deadline = _Deadline()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Limit database calls of this thread inside the block to ``seconds``; an earlier outer limit stays."""
    before = _deadline.value
    _deadline.value = min(before, time.monotonic() + seconds)
    try:
        yield
    finally:
        _deadline.value = before


def seconds_left() -> float:
    return _deadline.value - time.monotonic()
