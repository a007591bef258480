"""Server-sent events, and a response that streams them for as long as the client listens.

An event is one line ``data: {...}`` (``event: error`` before it when something went wrong) and an empty line. JSON is
written in ASCII: some clients split lines at U+2028 and U+0085 too.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core import metrics
from serving.errors import DeadlineExceeded
from serving.http import errors
from serving.http.cancel_on_disconnect import ClientGone, cancel_on_disconnect

log = logging.getLogger("ratchet.http")
DONE = b"data: [DONE]\n\n"
GRACE_SECONDS = 2.0
"""Engines end an answer at its deadline and say so; a client that reads too slowly to hear it is cut off this much
later."""


_ENCODER = json.JSONEncoder(separators=(",", ":"))


def dumps(value: Any) -> str:
    """JSON on one line, in ASCII."""
    return _ENCODER.encode(value)


def event(data: str, name: str = "") -> bytes:
    """One event. ``data`` must be one line."""
    return f"event: {name}\ndata: {data}\n\n".encode() if name else f"data: {data}\n\n".encode()


def failure(error: Exception) -> bytes:
    """The event that ends a stream which failed; its data is the error object of all other errors."""
    description = errors.described(error)
    metrics.http.refused(description.code or "other")
    if description.code == "internal":
        log.error("a stream failed", exc_info=error)
    return event(dumps(description.content), "error")


class EventStream(Response):
    """Sends events as they come: 200, then whatever ``events`` gives.

    Args:
        events: whole events; several may come at once. What it raises is sent as the last event.
        held: closed when the stream ends, however it ends.
        deadline: on the monotonic clock.
        failed: told what ``events`` raised.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncIterator[bytes], held: contextlib.AsyncExitStack, headers: Mapping[str, str],
        deadline: float, failed: Callable[[Exception], object] = lambda error: None,
    ) -> None:  # fmt: skip
        self.status_code = 200
        self.background = None
        self.events = events
        self.held = held
        self.deadline = deadline
        self.failed = failed
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the end, a failure or the deadline, or until the client has gone."""
        with contextlib.suppress(ClientGone, DeadlineExceeded, OSError):  # there is nobody left to tell
            async with self.held, cancel_on_disconnect(receive, self.deadline + GRACE_SECONDS):
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                while data := await self._next():
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes:
        try:
            return await anext(self.events, b"")
        except Exception as error:  # its generator has ended by this: the next one is the empty end
            self.failed(error)
            return failure(error)
