"""Token chunks on their way: what is ready at the same moment travels as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from serving.engines.vlm.generation import TokenChunk


def merge_chunks(chunks: Sequence[TokenChunk]) -> TokenChunk:
    """Neighbouring chunks as one."""
    last = chunks[-1]
    if len(chunks) == 1:
        return last
    return TokenChunk(
        "".join(chunk.text for chunk in chunks),
        tuple(token for chunk in chunks for token in chunk.tokens),
        tuple(value for chunk in chunks for value in chunk.logprobs),
        last.prompt_tokens,
        last.completion_tokens,
        last.finish,
    )


async def coalesce(source: AsyncIterator[TokenChunk], seconds: float) -> AsyncIterator[TokenChunk]:
    """What came since the last look, as one chunk: a reader that is slow makes few messages, not a long queue.

    Closing this closes the source.

    Raises:
        TimeoutError: the source did not end within the time.
    """
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    ready: list[TokenChunk] = []
    news = asyncio.Event()

    async def pump() -> None:
        try:
            async for chunk in source:
                ready.append(chunk)
                news.set()
        finally:
            news.set()

    task = loop.create_task(pump())
    try:
        while True:
            async with asyncio.timeout_at(end):
                await news.wait()
            news.clear()
            if ready:
                now, ready[:] = merge_chunks(ready), []
                yield now
            elif task.done():
                task.result()
                return
            if task.done():
                news.set()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
