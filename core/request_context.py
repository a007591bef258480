"""The request that this code runs for: log lines name it, without every function having to pass it on.

A context variable: tasks and :func:`asyncio.to_thread` inherit it. What is started within a request and lives longer,
for others too, is started with :func:`detached`.
"""

from __future__ import annotations

from contextvars import Context, ContextVar, Token
from dataclasses import dataclass


@dataclass(slots=True)
class RequestContext:
    """One request. Fields that are not known yet, or not here, are empty."""

    request_id: str = ""
    release: int | None = None
    adapter: str = ""


_current: ContextVar[RequestContext | None] = ContextVar("ratchet_request", default=None)


def begin(request_id: str) -> Token[RequestContext | None]:
    """A request begins in this task. Give what this returns to :func:`end`."""
    return _current.set(RequestContext(request_id))


def end(token: Token[RequestContext | None]) -> None:
    """The request has ended."""
    _current.reset(token)


def current() -> RequestContext | None:
    """The request that this code runs for, if it runs for one."""
    return _current.get()


def note(adapter: str, release: int | None = None) -> None:
    """Say which adapter, and which release, answers the request of this task."""
    request = _current.get()
    if request is None or not request.request_id:  # a replica, whose request's id is known elsewhere
        _current.set(RequestContext("", release, adapter))
        return
    request.adapter = adapter
    request.release = release


def detached() -> Context:
    """The context of work that is not a single request's, as in ``loop.create_task(work(), context=detached())``."""
    return Context()
