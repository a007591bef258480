"""Signing in with an API key, and out again."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from ops.console.request_context import Anyone, RequestContext
from ops.console.sessions import MAX_KEY_CHARS, Session

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
    principal = context.data.access.identify(key) if key else None
    if principal is None and context.data.access.unread(key):
        return _form(context, next, "The ledger does not answer, and this key may be new. Try again in a while.", 503)
    if principal is None or principal.kind == "anonymous":
        return _form(context, next, "This key is not known here, or it was revoked.", 401)
    if not principal.may("infer", "operate"):
        return _form(context, next, f"The key {principal.name!r} may neither look nor act.", 403)
    context.data.ledger.audit(principal.actor(), "sign in", "console", {})
    context.request.state.keep = Session.new(key)
    return RedirectResponse(_local(next), 303)


@router.post("/sign-out")
def sign_out(context: Anyone) -> Response:
    """Forget the key."""
    context.request.state.keep = Session.new()
    return RedirectResponse("/", 303)


def _form(context: RequestContext, next_page: str, wrong: str = "", status: int = 200) -> Response:
    return context.page(
        "sign_in.html", "Sign in", status, next_page=_local(next_page), wrong=wrong, plain=_without_tls(context.request)
    )


def _local(target: str) -> str:
    """A path of this console: nobody is sent elsewhere after signing in."""
    parts = urlsplit(target)
    right = target.startswith("/") and not target.startswith(("//", "/\\")) and not parts.scheme and not parts.netloc
    return target if right and target.isprintable() else "/"


def _without_tls(request: Request) -> bool:
    """Whether the browser will refuse to keep the session: it asks for TLS, and there is none."""
    secure = request.url.scheme == "https" or request.url.hostname in ("localhost", "127.0.0.1", "::1")
    return not request.app.state.local and not secure
