"""``/docs``: Swagger UI from an installed package instead of a CDN, on a page whose policy lets it talk to this server
only, since keys are pasted there. Page and schema are the same on every server, and need no key."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

ASSETS = "docs/assets"
"""Relative, like all URLs of the page: a proxy may add a prefix."""
POLICY = (
    "default-src 'none'; script-src 'self' 'sha256-{}'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""``{}``: digest of the page's one inline script."""


def add_to(app: FastAPI) -> None:
    app.mount(f"/{ASSETS}", StaticFiles(packages=[("fastapi_offline", "static")]))
    app.add_api_route("/docs", docs, include_in_schema=False)


async def docs() -> HTMLResponse:
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Ratchet API",
        swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
        swagger_css_url=f"{ASSETS}/swagger-ui.css",
        swagger_favicon_url=f"{ASSETS}/favicon.png",
    )
    script = re.findall(rb"<script>(.*?)</script>", bytes(page.body), re.DOTALL)
    digest = b64encode(sha256(script[0]).digest()).decode()
    page.headers["content-security-policy"] = POLICY.format(digest)
    return page
