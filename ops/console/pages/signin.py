"""Signing in with an API key, and out again."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from ops.console.identities import end_key
from ops.console.request_context import LOOK, Anyone, RequestContext, local_path
from ops.console.sessions import MAX_KEY_CHARS, Session
from ops.errors import LedgerUnavailable
from serving.http.client_address import came_by_tls

router = APIRouter()


@router.get("/sign-in")
def ask(context: Anyone, next: str = "/") -> Response:
    """The form."""
    return _form(context, next)


@router.post("/sign-in")
def sign_in(
    context: Anyone,
    key: Annotated[str, Form(max_length=MAX_KEY_CHARS)],
    next: Annotated[str, Form(max_length=2000)] = "/",
) -> Response:
    """A key that is known opens a session of its own; its use is written into the audit log."""
    key = key.strip()
    access = context.data.access
    came = access.clock()
    principal = access.identify(key) if key else None
    if principal is None and access.unread(key, came):
        return _form(context, next, "The ledger does not answer, and this key may be new. Try again in a while.", 503)
    if principal is None or principal.kind == "anonymous":
        return _form(context, next, "This key is not known here, has expired, or was revoked.", 401)
    if not principal.may(*LOOK):
        return _form(context, next, f"The key {principal.name!r} may neither look (`search`) nor act (`operate`).", 403)
    context.data.ledger.audit(principal.actor(), "sign in", "console", {})
    context.request.state.keep = Session.new(key)
    return RedirectResponse(local_path(next), 303)


@router.post("/sign-out")
def sign_out(context: Anyone) -> Response:
    """Forget the key; one that a sign-in by the identity provider made ends with it, if the ledger answers."""
    if context.principal is not None and context.data.settings.console.oidc.enabled:
        with suppress(LedgerUnavailable):
            end_key(context.data.ledger, context.principal.key_id)
    context.request.state.keep = Session.new()
    return RedirectResponse("/", 303)


def _form(context: RequestContext, next_page: str, wrong: str = "", status: int = 200) -> Response:
    return context.page(
        "sign_in.html", "Sign in", status, next_page=local_path(next_page), wrong=wrong,
        plain=_without_tls(context.request), provider=urlsplit(context.data.settings.console.oidc.issuer).hostname,
    )  # fmt: skip


def _without_tls(request: Request) -> bool:
    """Whether the browser will refuse to keep the session: it asks for TLS, and there is none."""
    secure = came_by_tls(request.scope) or request.url.hostname in ("localhost", "127.0.0.1", "::1")
    return not request.app.state.local and not secure
