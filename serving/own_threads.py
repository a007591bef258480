"""Threads for blocking calls of one purpose: what it waits for cannot use up the threads of another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class OwnThreads:
    """Like :func:`asyncio.to_thread`, which has one pool for the whole process.

    >>> keys = OwnThreads("keys")
    >>> await keys.run(ledger.api_keys)

    Args:
        name: what they are for.
        count: calls at once; more wait.
    """

    def __init__(self, name: str, count: int = 1) -> None:
        self._pool = ThreadPoolExecutor(count, name)

    async def run(
        self, function: Callable[Parameters, Result], /, *args: Parameters.args, **options: Parameters.kwargs
    ) -> Result:
        """What the function returns; it runs in this task's context."""
        call = partial(copy_context().run, function, *args, **options)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)
