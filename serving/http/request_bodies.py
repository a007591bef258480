"""Bounds of a request: size, speed, slot, and how long its client waits. :class:`RequestLimits` is outermost, so
refused requests cost nothing further. :class:`RequestBodies`, inside of authentication, reads each body within a time
and a byte budget before the request takes a slot, so slow clients hold none. Pure ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core import metrics
from core.settings.serving import Serve
from core.tracing import span
from serving.errors import DeadlineExceeded
from serving.http import errors
from serving.http.client_address import TrustedProxies, address, names_this_server, set_client
from serving.http.errors import ApiError
from serving.http.fair_room import SharedBudget

log = logging.getLogger("ratchet.http")
SEND_SECONDS = 30.0
"""Longest time to send an answer after its deadline."""
GRACE_SECONDS = 5.0
"""The minimum rate of a body applies after this."""
BODY_SECONDS, BODY_BYTES_PER_SECOND = 30.0, 16_384
"""Longest time for a whole body, and its lowest average rate."""
OPERATOR_SLOTS = 16
"""Concurrent operator calls of one process."""
FREE_ROUTES = ("/health", "/v2/health/", "/metrics")
"""Need no slot: health checks of a busy server must get in, and concurrent callers share an answer."""
OPERATOR_ROUTES = "/admin/"
ROLLBACK_ROUTE = "/admin/v1/rollback"
"""Has its own slots: releases that wait for the catalog, or hanging status calls, may hold all others."""
SEARCH_ROUTES = ("/v1/search", "/v1/samples/", "/v1/rerank", "/v2/rerank", "/rerank")
"""Have their own slots: requests that need no store go on while the catalog's store hangs."""
CLOSE = {"Connection": "close"}
LOOPBACK = ("127.", "::1", "::ffff:127.")
BACKSTOP_SECONDS = 0.2
"""After the deadline: the code that computes the answer ends first, with a better reason."""
GONE = 499
"""nginx's status for a client that closed its connection; only seen in metrics."""


class RequestBodies:
    """Refuses bodies that are too large (413) or too slow (408), and requests without room (429, 503)."""

    def __init__(self, app: ASGIApp, settings: Serve) -> None:
        self.app = app
        self.settings = settings
        self.bytes = SharedBudget(settings.body_budget_bytes, settings.caller_share)
        self.slots = SharedBudget(settings.queue, settings.caller_share)
        self.search_slots = SharedBudget(settings.queue, settings.caller_share)
        self.operator_slots = SharedBudget(OPERATOR_SLOTS)
        self.rollback_slots = SharedBudget(OPERATOR_SLOTS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(FREE_ROUTES):
            await self.app(scope, receive, send)
            return
        caller = caller_of(scope)
        body = _Body(self.settings, self.bytes, caller)
        try:
            with span("intake"):
                data = await body.read(receive)
            scope["state"] = {**scope.get("state", {}), "body": data}
            operator = scope["path"].startswith(OPERATOR_ROUTES)  # a release waits for the catalog, without a bound
            slots = self._slots_of(scope["path"])
            longest = None if operator else self.settings.deadline_seconds + SEND_SECONDS
            _take_slot(slots, caller)
            try:
                async with asyncio.timeout(longest) as limit:
                    await self.app(scope, _replayed(data, receive), send)
            except TimeoutError:
                if not limit.expired():
                    raise
                # The client does not read its answer. An unfinished one ends the connection.
                log.warning("an answer was not read within %g s", longest)
            finally:
                slots.give_back(caller, 1)
        except ApiError as error:
            await errors.answer(error)(scope, receive, send)
        finally:
            self.bytes.give_back(caller, body.size)

    def _slots_of(self, path: str) -> SharedBudget:
        if path == ROLLBACK_ROUTE:
            return self.rollback_slots
        if path.startswith(SEARCH_ROUTES):
            return self.search_slots
        return self.operator_slots if path.startswith(OPERATOR_ROUTES) else self.slots


@dataclass
class _Body:
    """The body of one request while it arrives and as long as it is held."""

    settings: Serve
    budget: SharedBudget
    caller: str
    size: int = 0

    async def read(self, receive: Receive) -> bytes:
        """Read all of it. Raises ApiError and ClientGone."""
        chunks: list[bytes] = []
        began = time.monotonic()
        while True:
            message = await self._next(receive, began)
            if message["type"] == "http.disconnect":
                raise ClientGone
            if chunk := message.get("body", b""):
                self._count(len(chunk))
                chunks.append(chunk)
            if not message.get("more_body"):
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _next(self, receive: Receive, began: float) -> Message:
        due = GRACE_SECONDS + self.size / BODY_BYTES_PER_SECOND
        left = began + min(due, BODY_SECONDS) - time.monotonic()
        try:
            async with asyncio.timeout(left):
                return await receive()
        except TimeoutError:
            raise ApiError(
                408, f"the body came too slowly: {self.size} bytes in {time.monotonic() - began:.0f} s.",
                code="body_timeout", headers=CLOSE,
            ) from None  # fmt: skip

    def _count(self, size: int) -> None:
        if self.size + size > self.settings.max_body_bytes:
            raise too_large(self.settings.max_body_bytes)
        if refusal := self.budget.take(self.caller, size):
            status, problem = 503, "the memory for request bodies is in use (it follows from serve.max_image_bytes)."
            if refusal == "caller":
                status, most = 429, f"more than {self.budget.caller_size} bytes together"
                problem = f"the bodies of your requests have {most} (serve.max_image_bytes, serve.caller_share)."
            raise ApiError(status, problem, code="overloaded", headers=CLOSE)
        self.size += size


def too_large(limit: int) -> ApiError:
    return ApiError(
        413, f"the body is larger than {limit} bytes (twice serve.max_image_bytes).", code="body_too_large",
        headers=CLOSE,
    )  # fmt: skip


def caller_of(scope: Scope) -> str:
    """A caller's name in the budgets: its key, else its address."""
    principal = scope.get("state", {}).get("principal")
    return f"key:{principal.key_id}" if principal is not None and principal.key_id else address(scope)


def _take_slot(slots: SharedBudget, caller: str) -> None:
    if refusal := slots.take(caller, 1):
        problem = "the queue is full; send the request again later."
        if refusal == "caller":
            problem = f"you have {slots.caller_size} requests that are not answered yet; send this one again later."
        raise ApiError(429, problem, code="overloaded")


def _replayed(data: bytes, receive: Receive) -> Receive:
    """The body as one message; later messages (a disconnect) come from the client."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": data, "more_body": False}

    return replayed


class RequestLimits:
    """Refuses bodies declared over ``max_body_bytes`` (413) and, if the server is for its own machine, peers and host
    names of others (403): Ray's ingress binds every address, even with host 127.0.0.1. ``proxies``: networks whose
    ``X-Forwarded-For`` is trusted."""

    def __init__(self, app: ASGIApp, settings: Serve, proxies: Sequence[str] = ()) -> None:
        self.app = app
        self.settings = settings
        self.proxies = TrustedProxies(proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def record_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.http.in_flight(1)
        try:
            self._check(scope)
            await self.app(scope, receive, record_status)
        except ApiError as error:
            await errors.answer(error)(scope, receive, record_status)
        finally:
            metrics.http.in_flight(-1)
            route = getattr(scope.get("route"), "path", "unmatched")
            metrics.http.request(route, status, time.perf_counter() - began)

    def _check(self, scope: Scope) -> None:
        client = scope.get("client")
        local = self.settings.on_loopback
        if local and client and not client[0].startswith(LOOPBACK):
            raise ApiError(403, "this server listens for its own machine only.", code="not_local")
        set_client(scope, self.proxies)
        headers, allowed = Headers(scope=scope), self.settings.allowed_hosts
        if (local or allowed) and not names_this_server(headers.get("host"), allowed):
            raise ApiError(
                403, "the Host header names another server; an operator lists further names in serve.allowed_hosts.",
                code="host_not_allowed",
            )  # fmt: skip
        encoding = headers.get("content-encoding", "").strip().lower() or "identity"
        if encoding != "identity":
            raise ApiError(
                415, f"content encoding {encoding[:80]!r} is not taken here; send the body as it is.",
                code="content_encoding", headers={"Accept-Encoding": "identity"},
            )  # fmt: skip
        declared = headers.get("content-length", "0")
        if not (declared.isascii() and declared.isdigit()) or int(declared[:20]) > self.settings.max_body_bytes:
            raise too_large(self.settings.max_body_bytes)


class ClientGone(ApiError):
    """The client closed its connection."""

    def __init__(self) -> None:
        super().__init__(GONE, "the client went away before the answer was ready.", code="client_gone")


@contextlib.asynccontextmanager
async def cancel_on_disconnect(receive: Receive, deadline: float) -> AsyncIterator[None]:
    """Cancel the block when the client leaves (ClientGone) or the deadline on the monotonic clock passes
    (DeadlineExceeded). ``receive``: the ASGI channel, after the body; nothing else may read from it meanwhile."""
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
