"""Who may connect, and what every request is measured by, whatever its route.

Pure ASGI and the outermost part: a request that is refused here costs nothing further. Bodies and slots are counted in
:mod:`serving.http.request_bodies`, behind authentication.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core import metrics
from core.settings.serving import Serve
from serving.http import errors
from serving.http.client_address import TrustedProxies, names_this_server, set_client
from serving.http.errors import ApiError
from serving.http.request_bodies import too_large

LOOPBACK = ("127.", "::1", "::ffff:127.")


class RequestLimits:
    """Refuses what declares a body over ``max_body_bytes`` (413) and, where the server is for its own machine, peers of
    other machines and names that are not this machine's (403). Ray's tuned ingress binds every address, also when the
    settings say 127.0.0.1.

    Args:
        proxies: networks whose ``X-Forwarded-For`` counts.
    """

    def __init__(self, app: ASGIApp, settings: Serve, proxies: Sequence[str] = ()) -> None:
        self.app = app
        self.settings = settings
        self.proxies = TrustedProxies(proxies)

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

        metrics.http.in_flight(1)
        try:
            self._check(scope)
            await self.app(scope, receive, record_status)
        except ApiError as error:
            await errors.answer(error.status_code, error.detail, code=error.code, headers=dict(error.headers or {}))(
                scope, receive, record_status
            )
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
