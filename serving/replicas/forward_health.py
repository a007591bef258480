"""Health of a replica's forward passes: a device that fails every pass fails fast, and would attract the load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

MAX_FAILURES: Final = 3
"""Consecutive failures, probes among them, after which the replica is replaced."""
PROBE_SECONDS: Final = 10.0
"""Between probes of an idle replica."""
STALL_SECONDS: Final = 30.0
"""Longest time without a successful pass before a busy replica probes itself: a device that hangs raises nothing, and a
pass behind one that never ends does not end either."""
PROBE_LIMIT_SECONDS: Final = 20.0
"""Below Serve's own limit for a health check (30 s), so that the reason gets into the log."""
PERSISTENT: Final = ("CUDA error", "CUDA failure", "device-side assert", "CUBLAS_STATUS", "CUDNN_STATUS")
"""Parts of messages after which every later call to the device in this process fails, too."""


class ForwardHealth:
    """Counts consecutive failures. A request's own fault does not add up, because probes in between pass."""

    def __init__(self, stall_seconds: float = STALL_SECONDS) -> None:
        """``stall_seconds``: longer than any pass that works."""
        self._stall_seconds = stall_seconds
        self._failures = 0
        self._last_error = ""
        self._broken = ""
        self._passed_at = time.monotonic()

    def succeeded(self) -> None:
        self._failures = 0
        self._passed_at = time.monotonic()

    def passed(self, at: float) -> None:
        """Note that a pass ended at this time of the monotonic clock; its request may have been given up since."""
        self._passed_at = max(self._passed_at, at)

    @property
    def stalled(self) -> bool:
        """True if no pass has ended for so long that a busy replica may hang."""
        return time.monotonic() - self._passed_at >= self._stall_seconds

    def failed(self, error: BaseException) -> None:
        """Count a failed pass that was not the request's fault."""
        self._failures += 1
        self._last_error = f"{type(error).__name__}: {str(error)[:300]}"
        if is_persistent(error):
            self._broken = self._last_error

    async def check(self, probe: Callable[[], Awaitable[Any]], busy: bool) -> None:
        """Probe if no pass worked lately or the last one failed. Requests test a busy replica, as long as passes end.
        Raises RuntimeError when passes fail repeatedly, or the device is lost."""
        due = self.stalled if busy else time.monotonic() - self._passed_at >= PROBE_SECONDS
        if not self._broken and (self._failures or due):
            try:
                async with asyncio.timeout(PROBE_LIMIT_SECONDS):
                    await probe()
            except Exception as error:
                self.failed(error)
            else:
                self.succeeded()
        if self._broken:
            raise RuntimeError(f"the device does not work any more: {self._broken}")
        if self._failures >= MAX_FAILURES:
            raise RuntimeError(f"{self._failures} forward passes in a row failed: {self._last_error}")


def is_persistent(error: BaseException) -> bool:
    """True if the device is lost to this process. Lack of memory is temporary."""
    message = str(error)
    return "out of memory" not in message and any(part in message for part in PERSISTENT)
