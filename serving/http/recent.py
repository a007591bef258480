"""A value that many ask for, and that is computed once for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from ops.request_context import detached

Value = TypeVar("Value")
FRESH_SECONDS = 1.0


class Recent(Generic[Value]):
    """A value that is computed again when it is older than ``seconds``; all who ask meanwhile get the same one."""

    def __init__(self, compute: Callable[[], Awaitable[Value]], seconds: float = FRESH_SECONDS) -> None:
        self._compute = compute
        self._seconds = seconds
        self._task: asyncio.Task[Value] | None = None
        self._ended = float("-inf")

    async def get(self) -> Value:
        """The value. Raises what computing it raised."""
        if self._task is None or (self._task.done() and time.monotonic() - self._ended >= self._seconds):
            self._task = asyncio.get_running_loop().create_task(self._timed(), context=detached())
        return await asyncio.shield(self._task)  # a caller that leaves does not end it for the others

    async def _timed(self) -> Value:
        try:
            return await self._compute()
        finally:
            self._ended = time.monotonic()
