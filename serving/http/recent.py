"""A value that all concurrent callers share. The console uses it, too, which has no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from core.request_context import detached

FRESH_SECONDS = 1.0
Value = TypeVar("Value")


class Recent(Generic[Value]):
    """A value that is recomputed when older than ``seconds``; concurrent callers share it."""

    def __init__(self, compute: Callable[[], Awaitable[Value]], seconds: float = FRESH_SECONDS) -> None:
        self._compute = compute
        self._seconds = seconds
        self._task: asyncio.Task[Value] | None = None
        self._ended = float("-inf")

    async def get(self) -> Value:
        if self._task is None or (self._task.done() and time.monotonic() - self._ended >= self._seconds):
            self._task = asyncio.get_running_loop().create_task(self._timed(), context=detached())
        return await asyncio.shield(self._task)  # a caller that leaves must not cancel it for others

    async def _timed(self) -> Value:
        try:
            return await self._compute()
        finally:
            self._ended = time.monotonic()
