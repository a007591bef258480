"""Authentication: who calls, whether the key has the scope that the route needs, and how often it may.

Pure ASGI and before every route, so a route that somebody adds is closed until :func:`needs` says otherwise.
"""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from core import metrics
from core.access import READ_SECONDS, Access, Principal
from core.errors import AccessError
from core.ledger.keys import SCOPES
from core.ledger.rows import KeyScope
from core.request_context import detached
from serving.http import errors
from serving.http.client_address import came_from_here
from serving.http.errors import ApiError
from serving.http.rate_limit import RateLimiter, address

CHALLENGE = {"WWW-Authenticate": "Bearer"}
ANY_KEY = ("/metrics", "/docs", "/openapi.json")


def needs(path: str) -> tuple[KeyScope, ...]:
    """The scopes of which a caller needs one; none for what is open to everybody."""
    if path.startswith("/health/"):
        return ()
    if path in ANY_KEY or path.startswith("/docs/"):
        return SCOPES
    if path.startswith(("/admin/v1/quarantine", "/v1/records")):
        return ("publish", "operate")
    if path.startswith("/admin"):
        return ("operate",)
    if path == "/v1/search" or path.startswith("/v1/samples"):
        return ("search",)
    return ("infer",)


class AuthMiddleware:
    """Answers 401, 403, 429 or 503 to those who may not, and leaves the :class:`Principal` of others in the request."""

    def __init__(self, app: ASGIApp, access: Access, rates: RateLimiter | None = None) -> None:
        self.app = app
        self.access = access
        self.rates = RateLimiter() if rates is None else rates
        self._reading: asyncio.Task[None] | None = None
        self._reading_since = 0.0
        self._thread = ThreadPoolExecutor(1, "keys")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it before its body is read."""
        if scope["type"] == "http":
            try:
                caller = await self._admit(scope)
                scope["state"] = {**scope.get("state", {}), "principal": caller}
            except ApiError as error:
                await errors.answer(
                    error.status_code, error.detail, error.param, error.code, dict(error.headers or {})
                )(scope, receive, send)
                return
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Principal | None:
        path = scope["path"]
        scopes = needs(path)
        forwarded = self.access.to_this_machine and not came_from_here(scope)
        if not scopes or (path == "/metrics" and self.access.metrics_open and not forwarded):
            return None
        token = bearer(Headers(scope=scope))
        came = self.access.clock()
        caller = await self._identify(token, came)
        if caller is None and self.access.unread(token, came):
            raise ApiError(
                503, "this key is not among those that were read last, and the ledger does not answer: it may be new.",
                code="unavailable",
            )  # fmt: skip
        if caller is None and token:
            raise ApiError(
                401, "this key is not valid: it is mistyped or cut short, has expired, or was revoked.",
                code="invalid_api_key", headers=CHALLENGE,
            )  # fmt: skip
        if caller is not None and caller.kind == "anonymous" and (forwarded or path == "/metrics"):
            caller = None
        if caller is not None:
            self._count(caller, scope)
        if caller is None or (caller.kind == "anonymous" and not caller.may(*scopes)):
            raise ApiError(
                401, f"this call needs a key with the scope {_either(scopes)}: `Authorization: Bearer rk_...`. "
                "An operator makes one with `ratchet keys create`.", code="invalid_api_key", headers=CHALLENGE,
            )  # fmt: skip
        if not caller.may(*scopes):
            has = ", ".join(sorted(caller.scopes))
            raise ApiError(
                403, f"this call needs the scope {_either(scopes)}; key {caller.name!r} has {has}.",
                code="insufficient_scope", headers={"WWW-Authenticate": 'Bearer error="insufficient_scope"'},
            )  # fmt: skip
        return caller

    async def _identify(self, token: str | None, came: float) -> Principal | None:
        """One reading at a time serves all who wait for it; while one hangs, nobody waits for more of it.

        A known key that is in use waits for none: the keys are read again before they are too old. While the ledger
        does not answer they are read behind all known keys.
        """
        entered = time.monotonic()
        if self.access.ages(token):
            self._read()
        while (delay := self.access.due(token, came)) is not None and not (
            self.access.silent and self.access.knows(token)
        ):
            await asyncio.sleep(delay)
            now = time.monotonic()
            reading = self._read()
            left = min(self._reading_since, entered) + READ_SECONDS - now
            if left <= 0:
                break
            await asyncio.wait([reading], timeout=left)
        return self.access.known(token)

    def _read(self) -> asyncio.Task[None]:
        """The reading of the keys that runs, or a new one."""
        if self._reading is None or self._reading.done():
            self._reading = asyncio.get_running_loop().create_task(self._refreshed(), context=detached())
            self._reading_since = time.monotonic()
        return self._reading

    async def _refreshed(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self.access.refresh, READ_SECONDS)

    def _count(self, caller: Principal, scope: Scope) -> None:
        who = f"key:{caller.key_id}" if caller.kind == "key" else address(scope)
        seconds = self.rates.take(who, caller.requests_per_minute)
        if seconds > 0:
            metrics.http.rate_limited(caller.name)
            shown = f"key {caller.name!r}" if caller.kind == "key" else "your address"
            raise ApiError(
                429, f"{shown} may make {caller.requests_per_minute} requests a minute.",
                code="rate_limited", headers={"Retry-After": str(math.ceil(seconds))},
            )  # fmt: skip


def bearer(headers: Headers) -> str | None:
    """The token of ``Authorization: Bearer <token>``, if there is one."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return (token.strip() or None) if scheme.lower() == "bearer" else None


def principal(request: Request) -> Principal:
    """Who makes this request. Only for routes that :func:`needs` names a scope for."""
    caller: Any = request.state.principal
    if not isinstance(caller, Principal):
        raise ApiError(401, "this call needs a key.", code="invalid_api_key", headers=CHALLENGE)
    return caller


def operator(request: Request, *scopes: KeyScope) -> str:
    """The caller's name for the audit log, where he has one of the scopes (default: ``operate``).

    Raises:
        ApiError: 403 without the scope, 400 with an ``x-ratchet-actor`` that cannot be recorded.
    """
    caller = principal(request)
    if not caller.may(
        *(scopes or ("operate",))
    ):  # the middleware checked it; a route that forgot to be closed is closed here
        raise ApiError(403, f"this call needs the scope {_either(scopes or ('operate',))}.", code="insufficient_scope")
    try:
        return caller.actor(_utf8(request.headers.get("x-ratchet-actor")))
    except AccessError as error:
        raise ApiError(400, f"x-ratchet-actor: {error}", param="x-ratchet-actor", code="invalid_actor") from None


def _utf8(header: str | None) -> str | None:
    """Headers are read as Latin-1; people write their names in UTF-8."""
    try:
        return header and header.encode("latin-1").decode()
    except UnicodeError:
        return header


def _either(scopes: tuple[KeyScope, ...]) -> str:
    return " or ".join(f"`{scope}`" for scope in scopes)
