"""Values that many ask for, and that are found out once for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from ops.request_context import detached

Value = TypeVar("Value")
FRESH_SECONDS = 1.0
READ_SECONDS = 1.0
"""Longest that a caller waits for a value of which an older one is known."""


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


class LastKnown(Generic[Value]):
    """What a store says, read in a thread of its own by one reading at a time. While the store is silent or away, what
    it said last. Used from one event loop.

    Args:
        read: blocks; may raise.
        name: of the thread.
    """

    def __init__(self, read: Callable[[], Value], name: str) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, name)
        self._task: asyncio.Task[Value] | None = None
        self._began = float("-inf")
        self._value: tuple[Value] | None = None

    async def get(self) -> Value:
        """The value, by a reading that began after this call where the store answers in time.

        Raises:
            Exception: what the reading raised, where no value is known.
        """
        came = time.monotonic()
        while True:
            if self._task is None or self._task.done():
                self._began = time.monotonic()
                self._task = asyncio.get_running_loop().create_task(self._once(), context=detached())
                self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # not "never retrieved"
            fresh, task = self._began >= came, self._task
            left = None if self._value is None else max(0.0, came + READ_SECONDS - time.monotonic())
            await asyncio.wait([task], timeout=left)
            if self._value is not None and (fresh or not task.done()):
                return self._value[0]
            if fresh:
                return task.result()

    async def _once(self) -> Value:
        value = await asyncio.get_running_loop().run_in_executor(self._thread, self._read)
        self._value = (value,)
        return value
