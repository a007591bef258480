"""The console under a path of a proxy (``console.path_prefix``). Its pages know their own paths alone; this adds the
prefix to what leaves, and takes it off what comes in. Pure ASGI.
"""

from __future__ import annotations

import re
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINK: Final = re.compile(rb'((?:href|src|action|hx-get|hx-post)=")(?=/(?!/))')
"""Before a path in an attribute. Texts of a page have no plain quote: they are escaped."""
REDIRECTS: Final = ("location", "hx-redirect")


class PathPrefix:
    """Serves an application under a path, whether or not the proxy takes that away."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        """``prefix``: as in ``/ratchet``."""
        self.app = app
        self.prefix = prefix
        self._in_url = re.compile(rf"^([a-z]+://[^/]*)?{re.escape(prefix)}(?=[/?]|$)")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
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
