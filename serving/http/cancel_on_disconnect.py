"""Work for a client only as long as it waits, and only until its deadline."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from starlette.types import Receive

from serving.errors import DeadlineExceeded
from serving.http.errors import ApiError

BACKSTOP_SECONDS = 0.2
"""After the deadline: whoever computes the answer ends by itself first, and knows why there is none."""
GONE = 499
"""nginx's status for a client that closed its connection: it is only ever seen in metrics."""


class ClientGone(ApiError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__(GONE, "the client went away before the answer was ready.", code="client_gone")


@contextlib.asynccontextmanager
async def cancel_on_disconnect(receive: Receive, deadline: float) -> AsyncIterator[None]:
    """Cancel the block when the client leaves or the deadline passes. The request's body must have been read before.

    Args:
        receive: the request's ASGI channel; nobody else may read from it meanwhile.
        deadline: on the monotonic clock.

    Raises:
        DeadlineExceeded: the deadline passed.
        ClientGone: the client closed its connection.
    """
    here = asyncio.current_task()
    assert here is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            continue
        gone = True
        here.cancel()

    watcher = asyncio.create_task(watch())
    limit = asyncio.timeout(deadline - time.monotonic() + BACKSTOP_SECONDS)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            "the deadline passed before the answer was ready.", "Ask for less at once, or try later."
        ) from None
    except asyncio.CancelledError:
        if gone and here.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()
