"""An asyncio event loop on a thread of its own, for code that is not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines of all threads on one event loop. Thread safe; the thread starts with the first coroutine.

    Args:
        name: of the thread.
        at_end: awaited on the loop by :meth:`close`, after everything that was running is cancelled.
    """

    def __init__(self, name: str, at_end: Callable[[], Awaitable[None]]) -> None:
        self._at_end = at_end
        self._lock = threading.Lock()
        self._started = threading.Event()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name=name, daemon=True)

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start ``work``. Its future is cancelled when the loop is closed first. Raises RuntimeError after that."""
        with self._lock:
            if self._closed:
                work.close()
                raise RuntimeError(f"{self._thread.name} is closed")
            if not self._started.is_set():
                self._thread.start()
                self._started.wait()
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel what is running and end the thread. Calling it again does nothing."""
        with self._lock:
            first, self._closed = not self._closed, True
        if first and self._started.is_set():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await self._stop.wait()
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._at_end()
