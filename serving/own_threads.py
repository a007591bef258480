"""Dedicated threads for blocking calls, so that a dependency that hangs cannot use up the threads of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Generic, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class OwnThreads:
    """Like :func:`asyncio.to_thread`, but with a thread pool of its own. ``count``: concurrent calls; more wait."""

    def __init__(self, name: str, count: int = 1) -> None:
        self._pool = ThreadPoolExecutor(count, name)

    async def run(
        self, function: Callable[Parameters, Result], /, *args: Parameters.args, **options: Parameters.kwargs
    ) -> Result:
        """Call the function in one of the threads, in this task's context."""
        call = partial(copy_context().run, function, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)


class BoundedCall(Generic[Result]):
    """Calls a function that may hang, waiting for at most ``seconds``. While a call hangs no second one is started, so
    an outage takes one thread, which does not delay the end of the process."""

    def __init__(self, function: Callable[[], Result], seconds: float) -> None:
        self._function = function
        self._seconds = seconds
        self._lock = threading.Lock()
        self._running: Future[Result] | None = None

    def __call__(self) -> Result:
        """Return the function's result. Raises what it raises, and TimeoutError when it takes too long."""
        with self._lock:
            if self._running is None or self._running.done():
                self._running = Future()
                threading.Thread(target=self._run, args=(self._running,), name="bounded-call", daemon=True).start()
            running = self._running
        try:
            return running.result(self._seconds)
        except TimeoutError:
            if running.done():
                raise
            raise TimeoutError(f"no answer within {self._seconds:g} s") from None

    def _run(self, future: Future[Result]) -> None:
        try:
            result = self._function()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
