"""Calls of code that may hang: one thread at most, and a bounded wait."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

Result = TypeVar("Result")


class BoundedCall(Generic[Result]):
    """Calls a function that may hang, and waits for a bounded time. While a call hangs no second one is begun, so that
    an outage takes one thread, and the thread does not hold up the end of the process.

    >>> BoundedCall(lambda: 7, seconds=5.0)()
    7
    """

    def __init__(self, function: Callable[[], Result], seconds: float) -> None:
        self._function = function
        self._seconds = seconds
        self._lock = threading.Lock()
        self._running: Future[Result] | None = None

    def __call__(self) -> Result:
        """The function's result. Raises what it raises, and TimeoutError when the result does not come in time."""
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
