"""Signing in with an API key, and out again."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response

from ops.console.sessions import MAX_KEY_CHARS, Session
from ops.console.visit import Anyone, Visit

router = APIRouter()


@router.get("/sign-in")
def ask(at: Anyone, next: str = "/") -> Response:
    """The form."""
    return _form(at, next)


@router.post("/sign-in")
def sign_in(
    at: Anyone, key: Annotated[str, Form(max_length=MAX_KEY_CHARS)], next: Annotated[str, Form(max_length=2000)] = "/"
) -> Response:
    """A key that is known opens a session of its own; its use is written into the audit log."""
    key = key.strip()
    principal = at.desk.access.identify(key) if key else None
    if principal is None and at.desk.access.unread(key):
        return _form(at, next, "The ledger does not answer, and this key may be new. Try again in a while.", 503)
    if principal is None or principal.kind == "anonymous":
        return _form(at, next, "This key is not known here, or it was revoked.", 401)
    if not principal.may("infer", "operate"):
        return _form(at, next, f"The key {principal.name!r} may neither look nor act.", 403)
    at.desk.ledger.audit(principal.actor(), "sign in", "console", {})
    at.request.state.keep = Session.new(key)
    return RedirectResponse(_local(next), 303)


@router.post("/sign-out")
def sign_out(at: Anyone) -> Response:
    """Forget the key."""
    at.request.state.keep = Session.new()
    return RedirectResponse("/", 303)


def _form(at: Visit, next_page: str, wrong: str = "", status: int = 200) -> Response:
    return at.page(
        "sign_in.html", "Sign in", status, next_page=_local(next_page), wrong=wrong, plain=_without_tls(at.request)
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
