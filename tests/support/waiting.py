"""Waiting in tests for events instead of durations."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SECONDS = 60.0
"""A machine on which something waits longer than this is broken, not busy."""


async def until(condition: Callable[[], object]) -> None:
    """Let others run until a condition holds. Raises TimeoutError."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)
