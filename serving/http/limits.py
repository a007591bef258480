"""Bounds that hold for every request, whatever its route: bytes of the body, requests at once, who may connect.

Pure ASGI, so that a body is counted while it comes in: one that is too large is refused at the byte that is too many.
"""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ops import metrics
from serving.http import errors

FREE_ROUTES = ("/health", "/metrics")
"""Answered even under overload: whoever looks why the server is busy must get in."""
LOOPBACK = ("127.", "::1", "::ffff:127.")


class RequestLimits:
    """Refuses bodies over ``max_body_bytes`` (413), requests over ``max_requests`` at once (429), and, with
    ``loopback_only``, peers of other machines (403): Ray's tuned ingress binds every address, also when the settings
    say 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_requests: int, loopback_only: bool) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_requests = max_requests
        self.loopback_only = loopback_only
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
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

        self.running += 1
        metrics.http.in_flight(1)
        try:
            await self._serve(scope, receive, record_status)
        except errors.ApiError as error:  # the body grew too large in a place where no route was there to catch it
            await errors.answer(error.status_code, error.detail, code=error.code)(scope, receive, record_status)
        finally:
            self.running -= 1
            metrics.http.in_flight(-1)
            route = getattr(scope.get("route"), "path", "unmatched")
            metrics.http.request(route, status, time.perf_counter() - began)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if self.loopback_only and client and not client[0].startswith(LOOPBACK):
            await errors.answer(403, "this server listens for its own machine only.", code="not_local")(
                scope, receive, send
            )
            return
        if self.running > self.max_requests and not scope["path"].startswith(FREE_ROUTES):
            await errors.answer(429, "the queue is full; send the request again later.", code="overloaded")(
                scope, receive, send
            )
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self.max_body_bytes:
            await self._too_large()(scope, receive, send)
            return
        await self.app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                raise errors.ApiError(413, self._size_message(), code="body_too_large")
            return message

        return counted

    def _too_large(self) -> ASGIApp:
        return errors.answer(413, self._size_message(), code="body_too_large", headers={"Connection": "close"})

    def _size_message(self) -> str:
        return f"the body is larger than {self.max_body_bytes} bytes (serve.max_body_bytes)."
