"""The request that the current code works for, so that log lines can name it. A context variable: tasks and
:func:`asyncio.to_thread` inherit it. Start work that outlives a request with :func:`detached`."""

from __future__ import annotations

from contextvars import Context, ContextVar, Token
from dataclasses import dataclass


@dataclass(slots=True)
class RequestContext:
    """One request. Unknown fields are empty."""

    request_id: str = ""
    release: int | None = None
    adapter: str = ""


_current: ContextVar[RequestContext | None] = ContextVar("ratchet_request", default=None)


def begin(request_id: str) -> Token[RequestContext | None]:
    """Start a request in this task. Pass the result to :func:`end`."""
    return _current.set(RequestContext(request_id))


def end(token: Token[RequestContext | None]) -> None:
    _current.reset(token)


def current() -> RequestContext | None:
    return _current.get()


def note(adapter: str, release: int | None = None) -> None:
    request = _current.get()
    if request is None or not request.request_id:  # a replica, where the request's ID is known elsewhere
        _current.set(RequestContext("", release, adapter))
        return
    request.adapter = adapter
    request.release = release


def detached() -> Context:
    """A context for work that is not a single request's, as in ``loop.create_task(work(), context=detached())``."""
    return Context()
