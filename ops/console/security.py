"""Sessions, and the rules for every request: host, size, session, headers. A session is one encrypted and signed cookie
(Fernet) with the visitor's API key; the console stores nothing. Every request resolves the key again, so revoking a key
ends its sessions, and the server sees what the console does for a visitor under the visitor's own key."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from pydantic import SecretStr
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.client_address import came_by_tls, names_this_server

COOKIE = "ratchet_console"
MAX_COOKIE_CHARS = 4000
MAX_KEY_CHARS = 500
PURPOSE = b"ratchet console sessions"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    "cache-control": "no-store",
}
"""On every answer, unless its page says otherwise (thumbnails may be cached)."""
STATIC = {**HEADERS, "cache-control": "max-age=300"}
"""On files that a browser may cache for a while."""
LINK = re.compile(rb'((?:href|src|action|hx-get|hx-post)=")(?=/(?!/))')
"""Precedes a path in an attribute. Texts of a page are escaped and contain no plain quote."""
REDIRECTS = ("location", "hx-redirect")
MAX_REQUESTS = 64
BOUNCE = b'<!doctype html><title>Ratchet</title><meta http-equiv="refresh" content="0"><p>One moment.</p>'


@dataclass(frozen=True, slots=True)
class Session:
    """A visitor. ``key`` is empty before the sign-in."""

    csrf: str
    """Every form returns it; pages of other sites cannot know it."""
    key: str = ""
    provider: Mapping[str, Any] = field(default_factory=dict)
    """Authlib's data during the sign-in, then for signing out at the provider; empty for a sign-in by key."""

    @classmethod
    def new(cls, key: str = "") -> Session:
        """A session with a new token: a sign-in never keeps the previous one."""
        return cls(secrets.token_urlsafe(24), key)

    def sent_by_it(self, token: str) -> bool:
        """True if ``token`` is this session's; in constant time."""
        return hmac.compare_digest(token.encode(), self.csrf.encode())


class Sessions:
    """Seals sessions into cookies and opens them. The secret derives from the operators' key: replicas of the console
    open each other's cookies, and changing the key ends every session."""

    def __init__(self, operator_key: SecretStr, hours: float) -> None:
        secret = hmac.digest(operator_key.get_secret_value().encode(), PURPOSE, hashlib.sha256)
        self._fernet = Fernet(base64.urlsafe_b64encode(secret))
        self.seconds = int(hours * 3600)

    def seal(self, session: Session) -> str:
        return self._fernet.encrypt(json.dumps([session.csrf, session.key, dict(session.provider)]).encode()).decode()

    def open(self, cookie: str | None) -> Session | None:
        """The session of a cookie; None if it is missing, expired or invalid."""
        if not cookie or len(cookie) > MAX_COOKIE_CHARS:
            return None
        try:
            csrf, key, provider = json.loads(self._fernet.decrypt(cookie.encode(), ttl=self.seconds))
        except (InvalidToken, ValueError):
            return None
        return Session(csrf, key, provider)


class TooLarge(HTTPException):
    def __init__(self) -> None:
        super().__init__(413)


@dataclass
class SecurityMiddleware:
    """Refuses unknown hosts (on loopback), large bodies and too many requests; opens the session and adds headers. Pure
    ASGI, so that bodies are counted while they arrive. ``local``: the console listens on loopback. Then only its own
    names and ``names`` are answered, against DNS rebinding, and cookies need no TLS where none is used."""

    app: ASGIApp
    sessions: Sessions
    max_body_bytes: int
    local: bool
    names: Sequence[str] = ()
    running: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        known = self.sessions.open(_cookie(headers))
        session = known or Session.new()
        state = scope.setdefault("state", {})
        state["session"] = session

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                for name, value in (STATIC if scope["path"].startswith("/static/") else HEADERS).items():
                    answer.setdefault(name, value)
                cookie_session: Session | None = state.get("keep", session if known is None else None)
                if (
                    cookie_session is not None
                    and "no_cookie" not in state
                    and not scope["path"].startswith(("/static/", "/health/"))
                ):
                    answer.append("set-cookie", self._set_cookie(cookie_session, came_by_tls(scope)))
            await send(message)

        self.running += 1
        try:
            refusal = self._refusal(scope, headers)
            if refusal is not None:
                await refusal(scope, receive, guarded)
            elif known is None and _came_from_elsewhere(scope, headers):
                # Browsers do not send a Strict cookie along a link on another site, but do when our own page asks.
                state["no_cookie"] = True
                await PlainTextResponse(BOUNCE, media_type="text/html")(scope, receive, guarded)
            else:
                await self.app(scope, self._counted(receive), guarded)
        except TooLarge:
            await self._too_large()(scope, receive, guarded)
        finally:
            self.running -= 1

    def _refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        host = headers.get("host", "")
        if self.local and not names_this_server(host, self.names):
            words = (
                f"this console answers to its own machine only, and was asked for as {host[:200]!r}. "
                "Is that the name of a proxy in front of it? List the name in serve.allowed_hosts."
            )
            return PlainTextResponse(words, 421)
        if self.running > MAX_REQUESTS:
            return PlainTextResponse("the console is busy; try again.", 503, {"retry-after": "1"})
        declared = headers.get("content-length", "0")
        if not declared.isdigit() or int(declared) > self.max_body_bytes:
            return self._too_large()
        return None

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.max_body_bytes:
                raise TooLarge
            return message

        return counted

    def _too_large(self) -> ASGIApp:
        words = f"what you sent is larger than {self.max_body_bytes:,} bytes. Scale the picture down."
        return PlainTextResponse(words, 413, {"connection": "close"})

    def _set_cookie(self, session: Session, tls: bool) -> str:
        cookie: SimpleCookie = SimpleCookie()
        cookie[COOKIE] = self.sessions.seal(session)
        morsel = cookie[COOKIE]
        morsel["path"], morsel["httponly"], morsel["samesite"] = "/", True, "Strict"
        morsel["max-age"] = self.sessions.seconds
        if tls or not self.local:
            morsel["secure"] = True
        return morsel.OutputString()


def _cookie(headers: Headers) -> str | None:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return None if morsel is None else morsel.value


def _came_from_elsewhere(scope: Scope, headers: Headers) -> bool:
    return (
        scope["method"] == "GET"
        and headers.get("sec-fetch-site") == "cross-site"
        and headers.get("sec-fetch-mode") == "navigate"
    )


class PathPrefix:
    """Serves an application under a path (``console.path_prefix``), whether or not a proxy strips it. Adds the prefix
    to responses and removes it from requests; pages only know their own paths. Pure ASGI."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app = app
        self.prefix = prefix
        self._in_url = re.compile(rf"^([a-z]+://[^/]*)?{re.escape(prefix)}(?=[/?]|$)")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = self._in_url.sub("", scope["path"]) or "/"
        inner = {**scope, "path": path, "raw_path": path.encode(), "headers": list(scope["headers"])}
        if current := Headers(scope=inner).get("hx-current-url"):
            MutableHeaders(scope=inner)["hx-current-url"] = self._in_url.sub(r"\1", current)
        await self.app(inner, receive, self._outwards(send))

    def _outwards(self, send: Send) -> Send:
        start: Message = {}
        page: list[bytes] = []

        async def outwards(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=list(message["headers"]))
                for name in REDIRECTS:
                    if (target := headers.get(name, "")).startswith("/"):
                        headers[name] = self.prefix + target
                start = {**message, "headers": headers.raw}
                if not headers.get("content-type", "").startswith("text/html"):
                    await send(start)
                    start = {}
                return
            if not start:
                await send(message)
                return
            page.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = LINK.sub(rb"\g<1>" + self.prefix.encode(), b"".join(page))
            headers = MutableHeaders(raw=list(start["headers"]))
            if "content-length" in headers:
                headers["content-length"] = str(len(body))
            await send({**start, "headers": headers.raw})
            await send({"type": "http.response.body", "body": body})

        return outwards
