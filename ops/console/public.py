"""The public mode: a read-only console that needs no key, for a team's screen.

What it never shows: keys, names of people, what operators wrote, messages of errors, names of sources, and, unless
``console.public_samples`` is set, anything of a sample. It has no form and no session, and takes no method but GET.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.http.client_address import RateLimiter, TrustedProxies, address, set_client

SAFE_METHODS: Final = frozenset({"GET", "HEAD"})
SPEAKERS: Final = frozenset({"updater", "guard"})
"""Actors whose reasons are made by Ratchet from names and numbers; those of others may say anything."""
NAV: Final = (
    ("/", "Overview"),
    ("/releases", "Releases"),
    ("/models", "Models"),
    ("/gate", "Gate"),
    ("/stream", "Stream"),
    ("/budget", "Budget"),
)
REFRESH_SECONDS: Final = 10
"""A page asks for itself again after this."""


class ReadOnly:
    """Refuses every method that could change something, and more requests than an address may make. Pure ASGI.

    Args:
        requests_per_minute: of one address; probes under ``/health/`` are not counted.
        trusted_proxies: networks whose ``X-Forwarded-For`` is believed.
    """

    def __init__(self, app: ASGIApp, requests_per_minute: int, trusted_proxies: Sequence[str] = ()) -> None:
        self.app = app
        self._per_minute = requests_per_minute
        self._limiter = RateLimiter()
        self._proxies = TrustedProxies(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            scope.setdefault("state", {})["no_cookie"] = True
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        if scope["method"] not in SAFE_METHODS:
            return PlainTextResponse("this console is public and read-only.", 403)
        if scope["path"].startswith("/health/"):
            return None
        set_client(scope, self._proxies)
        wait = self._limiter.take(address(scope), self._per_minute)
        if wait:
            return PlainTextResponse("too many requests.", 429, {"retry-after": str(math.ceil(wait))})
        return None


def without_samples(report: Mapping[str, Any]) -> dict[str, Any]:
    """A gate report without anything of a sample: no regressions, no pairs of images that look alike."""
    diagnostics = report.get("diagnostics")
    suites = [{**suite, "worst": []} for suite in report.get("suites") or ()]
    if not diagnostics:
        return {**report, "suites": suites}
    pairs = {suite: {**pair, "shown": []} for suite, pair in diagnostics["pairs"].items()}
    return {**report, "suites": suites, "diagnostics": {**diagnostics, "pairs": pairs}}
