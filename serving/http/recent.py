"""Values that many ask for, and that are found out once for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from core.ledger.rows import ReleaseRow
from core.request_context import detached
from serving.own_threads import OwnThreads

Value = TypeVar("Value")
FRESH_SECONDS = 1.0
MAX_RELEASES = 500
"""That `/v1/releases` lists, and that are kept."""
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


class LastReleases:
    """The newest releases, read in a thread of its own by one reading at a time. While the ledger is silent or away,
    those that it named last. Used from one event loop.

    Args:
        read: the newest so many, newest first; blocks, may raise.
    """

    def __init__(self, read: Callable[[int], list[ReleaseRow]]) -> None:
        self._read = read
        self._thread = OwnThreads("releases")
        self._task: asyncio.Task[list[ReleaseRow]] | None = None
        self._began = float("-inf")
        self._wanted = 0
        """Most that one of those asks for who wait for the next reading."""
        self._known: list[ReleaseRow] | None = None

    async def get(self, limit: int) -> list[ReleaseRow]:
        """The newest releases, by a reading that began after this call where the ledger answers in time. Fewer than
        ``limit`` may be known while it does not.

        Raises:
            Exception: what the reading raised, where none is known.
        """
        came = time.monotonic()
        self._wanted = max(self._wanted, limit)
        while True:
            if self._task is None or self._task.done():
                self._began = time.monotonic()
                size, self._wanted = max(limit, self._wanted), 0
                self._task = asyncio.get_running_loop().create_task(self._once(size), context=detached())
                self._task.add_done_callback(lambda task: task.cancelled() or task.exception())  # not "never retrieved"
            fresh, task = self._began >= came, self._task
            left = None if self._known is None else max(0.0, came + READ_SECONDS - time.monotonic())
            await asyncio.wait([task], timeout=left)
            if self._known is not None and (fresh or not task.done()):
                return self._known[:limit]
            if fresh:
                return task.result()[:limit]

    async def _once(self, size: int) -> list[ReleaseRow]:
        rows = await self._thread.run(self._read, size)
        older = [row for row in self._known or () if rows and row.number < rows[-1].number]
        adjacent = bool(older) and older[0].number == rows[-1].number - 1
        self._known = [*rows, *older][:MAX_RELEASES] if adjacent else rows
        return self._known
