"""How the catalog's loops wait for work."""

from __future__ import annotations

import asyncio
import contextlib


async def wait_for_wake(event: asyncio.Event, seconds: float) -> None:
    """Return when the event is set, or after ``seconds``.

    Not :func:`asyncio.wait_for`, which in Python 3.11 swallows a cancellation that comes as its wait ends: a loop that
    is woken as it is cancelled would go on for ever.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
