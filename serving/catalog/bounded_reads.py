"""Threads that read the catalog's store, with a bound on each read, and a breaker.

Nothing ends a read of a store that hangs but Lance's own retries, minutes later: its thread is taken until then. So
when one took too long, the others fail at once, and now and then one tries whether the store answers again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from core.errors import StoreUnavailable

Result = TypeVar("Result")


class BoundedReads:
    """Calls functions that read, where the event loop does not wait for them. Use from one event loop."""

    def __init__(self, threads: int, seconds: float, retry_seconds: float) -> None:
        """Args:
        seconds: longest time of a call.
        retry_seconds: after a call that took longer, one call in this time is made, and others fail.
        """
        self.seconds = seconds
        self.retry_seconds = retry_seconds
        self._threads = ThreadPoolExecutor(threads, "read")
        self._hangs = False
        self._try_at = 0.0

    async def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """What the function returns.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        if self._hangs:
            if time.monotonic() < self._try_at:
                raise self._unavailable()
            self._try_at = time.monotonic() + self.retry_seconds
        try:
            async with asyncio.timeout(self.seconds) as limit:
                result = await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
        except TimeoutError:
            if not limit.expired():
                raise
            self._hangs, self._try_at = True, time.monotonic() + self.retry_seconds
            raise self._unavailable() from None
        self._hangs = False
        return result

    def _unavailable(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"the catalog's store does not answer within {self.seconds:g} s.", "Send the request again later."
        )
