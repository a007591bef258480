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


def patiently(call: Callable[[], object], error: type[Exception], tries: int = 5) -> None:
    """Call, and again after this error: a busy machine is slower than the bound of a call. Raises the last one."""
    try:
        call()
    except error:
        if tries == 1:
            raise
        patiently(call, error, tries - 1)
