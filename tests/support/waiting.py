"""Waiting in tests for what happens, and not for a time in which it ought to have happened."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SECONDS = 60.0
"""A machine on which something waits longer than this is broken, not busy."""


async def until(condition: Callable[[], object]) -> None:
    """Let others run until something is so.

    Raises:
        TimeoutError: it does not come to be.
    """
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)
