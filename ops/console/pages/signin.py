"""Signing in with an API key, and out again."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from core.errors import LedgerUnavailable
from ops.console.identities import end_key
from ops.console.pages import oidc
from ops.console.request_context import LOOK, Anyone, RequestContext, local_path
from ops.console.sessions import MAX_KEY_CHARS, Session
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
    next: Annotated[str, Form()] = "/",
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
async def sign_out(context: Anyone) -> Response:
    """Forget the key; one that a sign-in by the identity provider made ends with it, if the ledger answers, and so does
    the provider's session.
    """
    if context.principal is not None and context.data.settings.console.oidc.enabled:
        with suppress(LedgerUnavailable):
            await asyncio.to_thread(end_key, context.data.ledger, context.principal.key_id)
    url = await oidc.end_session_url(context)
    context.request.state.keep = Session.new()
    if url is None:
        return RedirectResponse("/", 303)
    # A page, which leads on by itself: no form may lead to another site (security.POLICY).
    gone = replace(context, session=context.request.state.keep, principal=None)
    answer = gone.page("signed_out.html", "Signed out", url=url, provider=_provider(context))
    answer.headers["refresh"] = f"0;url={url}"
    return answer


def _form(context: RequestContext, next_page: str, wrong: str = "", status: int = 200) -> Response:
    return context.page(
        "sign_in.html", "Sign in", status, next_page=local_path(next_page), wrong=wrong,
        plain=_without_tls(context.request), provider=_provider(context),
    )  # fmt: skip


def _provider(context: RequestContext) -> str | None:
    return urlsplit(context.data.settings.console.oidc.issuer).hostname


def _without_tls(request: Request) -> bool:
    """Whether the browser will refuse to keep the session: it asks for TLS, and there is none."""
    secure = came_by_tls(request.scope) or request.url.hostname in ("localhost", "127.0.0.1", "::1")
    return not request.app.state.local and not secure
