"""What one request waits for at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def gathered(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results; the first failure, or a cancellation, ends the rest."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
