"""Authentication: the caller, the scope that a route requires of its key, its rate, and the copy of the keys. Pure ASGI
and before every route, so a new route is closed until :func:`needs` says otherwise."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fastapi import Request
from pydantic import SecretStr, TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from core import metrics
from core.access import READ_SECONDS, Access, Principal
from core.artifacts import Artifacts
from core.errors import AccessError
from core.files import replace_file
from core.ledger.keys import SCOPES
from core.ledger.rows import KeyRow, KeyScope
from core.request_context import detached
from core.settings import Settings
from serving.errors import Unavailable
from serving.http import errors
from serving.http.client_address import RateLimiter, address, came_from_here
from serving.http.errors import ApiError, field_error
from serving.own_threads import BoundedCall, OwnThreads

CHALLENGE = {"WWW-Authenticate": "Bearer"}
log = logging.getLogger("ratchet.access")
FORMAT: Final = 1
KEY: Final = "keys.json"
ARTIFACTS_SECONDS: Final = 5.0
MAX_BYTES: Final = 16 << 20
"""A key takes some 300 bytes; more is not read from the file."""
_ROWS: Final = TypeAdapter(list[KeyRow])


def needs(path: str) -> tuple[KeyScope, ...]:
    """The scopes of which a caller needs one; empty for open paths."""
    if path in ("/docs", "/openapi.json", "/health") or path.startswith(("/docs/", "/health/", "/v2/health/")):
        return ()
    if path == "/metrics":
        return SCOPES
    if path.startswith(("/admin/v1/quarantine", "/v1/records")):
        return ("publish", "operate")
    if path.startswith("/admin"):
        return ("operate",)
    if path in ("/v1/feedback", "/v1/feedback/ubi"):
        return ("feedback",)
    if path == "/v1/search" or path.startswith("/v1/samples"):
        return ("search",)
    return ("infer",)


class AuthMiddleware:
    """Answers 401, 403, 429 or 503 to callers without access; adds the :class:`Principal` of others to the request."""

    def __init__(self, app: ASGIApp, access: Access, rates: RateLimiter | None = None) -> None:
        self.app = app
        self.access = access
        self.rates = RateLimiter() if rates is None else rates
        self._reading: asyncio.Task[None] | None = None
        self._reading_since = 0.0
        self._thread = OwnThreads("keys")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                caller = await self._admit(scope)
                scope["state"] = {**scope.get("state", {}), "principal": caller}
            except ApiError as error:
                await errors.answer(error)(scope, receive, send)
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
        """One reading at a time serves all that wait for it; while it hangs, requests give up after
        :data:`READ_SECONDS`. Known keys in use do not wait, because the keys are read again before they are too old or,
        while the ledger is silent, in the background."""
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
        if self._reading is None or self._reading.done():
            reading = self._thread.run(self.access.refresh, READ_SECONDS)
            self._reading = asyncio.get_running_loop().create_task(reading, context=detached())
            self._reading_since = time.monotonic()
        return self._reading

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


def require(request: Request, *scopes: KeyScope) -> Principal:
    """The caller, where the call needs one of these scopes too. Raises ApiError (401, 403)."""
    caller: Any = request.state.principal
    if not isinstance(caller, Principal):
        raise ApiError(401, "this call needs a key.", code="invalid_api_key", headers=CHALLENGE)
    if not caller.may(*scopes):
        raise ApiError(403, f"this call needs the scope {_either(scopes)}.", code="insufficient_scope")
    return caller


def operator(request: Request, *scopes: KeyScope) -> str:
    """The caller's name for the audit log. Raises ApiError: 403 without one of the scopes (default: ``operate``), 400
    with an ``x-ratchet-actor`` that cannot be recorded."""
    caller = require(request, *(scopes or ("operate",)))  # the middleware checked it; this closes routes that it missed
    try:
        return caller.actor(_utf8(request.headers.get("x-ratchet-actor")))
    except AccessError as error:
        raise field_error("x-ratchet-actor", str(error), "invalid_actor") from None


def _utf8(header: str | None) -> str | None:
    """Decode UTF-8 names in headers, which are read as Latin-1."""
    try:
        return header and header.encode("latin-1").decode()
    except UnicodeError:
        return header


def _either(scopes: tuple[KeyScope, ...]) -> str:
    return " or ".join(f"`{scope}`" for scope in scopes)


class KeyCopy:
    """A signed copy of the API keys, so that a server that starts while the ledger is away knows its clients:

        {"format": 1, "hmac": "<of the rest>", "keys": [{"id": "0123abcd", "name": "ci-bot", "digest": "...", ...}]}

    It has only digests of the secrets; each node keeps one, and the artifacts have it for new nodes. It is signed with
    the operator key (HMAC-SHA-256), so write access to the artifacts is not enough to create a key. Failures are
    logged. Use from one thread at a time."""

    def __init__(self, path: Path, artifacts: Artifacts, secret: SecretStr) -> None:
        """``path``: this node's copy. ``artifacts``: have another copy; may be away. ``secret``: the operator key."""
        self._path = path
        self._secret = secret
        self._artifacts = artifacts
        self._pending = self._written = b""
        self._read_artifacts = BoundedCall(lambda: artifacts.read_bytes(KEY), ARTIFACTS_SECONDS)
        self._write_artifacts = BoundedCall(lambda: artifacts.write_bytes(KEY, self._pending), ARTIFACTS_SECONDS)

    @classmethod
    def of(cls, settings: Settings) -> KeyCopy:
        return cls(settings.home / "serving" / "keys.json", Artifacts(settings.artifacts), settings.operator_key())

    def keep(self, rows: Iterable[KeyRow]) -> None:
        """Write the keys if they differ from those that this process wrote last."""
        data = self._encode(rows)
        if data == self._written:
            return
        try:
            replace_file(self._path, data, mode=0o600)
            self._pending = data
            self._write_artifacts()
            self._written = data
        except Exception as error:
            log.warning("the copy of the keys cannot be written, and is tried again: %s", error)

    def read(self) -> list[KeyRow]:
        """The keys of the artifacts' copy, else of the node's; empty if no copy is intact and signed."""
        for source, read in (("artifacts", self._read_artifacts), ("file", self._read_file)):
            try:
                return self._decode(read())
            except Exception as error:
                log.warning("no keys from the %s: %s: %s", source, type(error).__name__, str(error)[:200])
        return []

    def _read_file(self) -> bytes:
        with self._path.open("rb") as file:
            return file.read(MAX_BYTES)

    def _encode(self, rows: Iterable[KeyRow]) -> bytes:
        stable = [replace(row, last_used_at=None) for row in sorted(rows, key=lambda row: row.id)]
        keys = _ROWS.dump_python(stable, mode="json")
        return json.dumps({"format": FORMAT, "hmac": self._sign(keys), "keys": keys}, indent=1).encode()

    def _decode(self, data: bytes) -> list[KeyRow]:
        try:
            content: Any = json.loads(data)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r} is not {FORMAT}")
            if not hmac.compare_digest(self._sign(content["keys"]), content["hmac"]):
                raise ValueError("it is not signed with the operator key of this server")
            return _ROWS.validate_python(content["keys"])
        except (ValueError, KeyError, TypeError, RecursionError, ValidationError) as error:
            raise Unavailable(f"the copy of the keys cannot be used: {str(error)[:200]}.") from None

    def _sign(self, keys: Any) -> str:
        text = json.dumps(keys, sort_keys=True, separators=(",", ":"))
        return hmac.new(self._secret.get_secret_value().encode(), text.encode(), "sha256").hexdigest()
