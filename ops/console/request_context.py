"""The context of a request: the visitor, their rights, and how answers are rendered."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Final
from urllib.parse import urlencode, urlsplit

from fastapi import Depends, Request
from fastapi.responses import HTMLResponse

from core.access import Principal
from core.ledger.rows import KeyScope
from ops.console import public
from ops.console.data import ConsoleData
from ops.console.security import Session
from ops.console.template_filters import TEMPLATES
from ratchet_client import Client
from serving.http.client_address import came_from_here

NAV = (
    ("/", "Overview"),
    ("/playground", "Playground"),
    ("/compare", "Compare"),
    ("/releases", "Releases"),
    ("/models", "Models"),
    ("/gate", "Gate"),
    ("/stream", "Stream"),
    ("/quarantine", "Quarantine"),
    ("/feedback", "Review"),
    ("/held", "Held"),
    ("/budget", "Budget"),
    ("/audit", "Audit"),
)

MAX_NEXT: Final = 1000
LOOK: Final[tuple[KeyScope, ...]] = ("search", "operate")
"""Pages show samples of the corpus, so viewing needs one of these scopes."""


def nav(public_mode: bool) -> list[tuple[str, str]]:
    return [(link, name) for link, name in NAV if not public_mode or link in public.PAGES]


class ErrorPage(Exception):
    """Raised to answer with a page that shows a problem and its fix."""

    def __init__(self, status: int, title: str, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.status, self.title, self.message, self.fix = status, title, message, fix


class SignIn(Exception):
    """Raised when a page needs a key and the visitor has none."""

    def __init__(self, next_page: str) -> None:
        super().__init__(next_page)
        self.next_page = next_page


@dataclass(frozen=True)
class RequestContext:
    request: Request
    data: ConsoleData
    session: Session
    principal: Principal | None

    @property
    def public(self) -> bool:
        """True in public mode, see :mod:`ops.console.public`."""
        return self.data.settings.console.public

    @property
    def operator(self) -> bool:
        return self.principal is not None and self.principal.may("operate")

    @property
    def signed_in(self) -> bool:
        return self.principal is not None and self.principal.kind != "anonymous"

    @property
    def partial(self) -> bool:
        return self.request.headers.get("hx-request") == "true"

    @property
    def here(self) -> str:
        current = self.request.headers.get("hx-current-url", "") if self.partial else str(self.request.url)
        parts = urlsplit(current)
        if self.request.method != "GET" or not parts.path.startswith("/"):
            return "/"
        return f"{parts.path}?{parts.query}" if parts.query else parts.path

    def client(self, timeout: float = 60.0) -> Client:
        return self.data.client(self.session.key, timeout)

    def page(self, template: str, title: str, status: int = 200, **facts: Any) -> HTMLResponse:
        path = self.request.url.path
        section = next((link for link, _ in reversed(NAV) if path == link or path.startswith(f"{link}/")), "/")
        return self.part(template, status, title=title, nav=nav(self.public), section=section, here=self.here, **facts)

    def dialog(self, template: str, title: str, status: int = 200, **facts: Any) -> HTMLResponse:
        """A part that opens over the page; a page of its own without scripts."""
        if self.partial:
            return self.part(template, status, title=title, **facts)
        return self.page("alone.html", title, status, inner=template, **facts)

    def part(self, template: str, status: int = 200, **facts: Any) -> HTMLResponse:
        return HTMLResponse(
            TEMPLATES.get_template(template).render(context=self, csrf=self.session.csrf, public=self.public, **facts),
            status,
        )


def request_context(request: Request) -> RequestContext:
    """The context of a request, also for pages that everyone may see."""
    data: ConsoleData = request.app.state.data
    session: Session = request.state.session
    if data.settings.console.public:
        return RequestContext(request, data, session, None)
    key = session.key or None
    local = request.app.state.local and came_from_here(request.scope)
    principal = data.access.identify(key) if key or local else None
    if key and (principal is None or principal.kind == "anonymous"):
        principal = None  # the key was revoked
    return RequestContext(request, data, session, principal)


async def intended(request: Request) -> None:
    """Refuse a POST that does not carry the session's token as header or field."""
    if request.method in ("GET", "HEAD"):
        return
    token = request.headers.get("x-csrf-token") or (await request.form()).get("csrf") or ""
    session: Session = request.state.session
    if not isinstance(token, str) or not session.sent_by_it(token):
        raise ErrorPage(
            403, "This form is too old", "It was not sent by a page of this session.", "Reload the page and try again."
        )


def reader(context: Annotated[RequestContext, Depends(request_context)]) -> RequestContext:
    """A visitor who may view; in public mode, every visitor. Raises SignIn."""
    if context.public:
        return context
    if context.principal is None or not context.principal.may(*LOOK):
        raise SignIn(context.here)
    return context


def operator(context: Annotated[RequestContext, Depends(reader)]) -> RequestContext:
    """A visitor who may act. Raises SignIn, or ErrorPage when the key may not."""
    if context.public:
        raise ErrorPage(403, "This console is read-only", "It is in public mode.", "Use one that is not, or `ratchet`.")
    if not context.signed_in:
        raise SignIn(context.here)
    if not context.operator:
        name = context.principal.name if context.principal else ""
        raise ErrorPage(
            403, "Not allowed", f"The key {name!r} may look, but not act.",
            "Sign in with a key of scope `operate`." if not context.session.provider else
            "An operator can name you or one of your groups in console.oidc; the audit log has which groups the "
            "provider sent when you signed in.",
        )  # fmt: skip
    return context


def local_path(target: str) -> str:
    """``target`` if it is a path of this console, else ``/``: sign-in never redirects elsewhere. Long ones are dropped,
    since they travel to the identity provider and back in a cookie."""
    parts = urlsplit(target)
    right = target.startswith("/") and not target.startswith(("//", "/\\")) and not parts.scheme and not parts.netloc
    short = len(json.dumps(target)) <= MAX_NEXT
    return target if right and short and target.isprintable() else "/"


def sign_in_link(next_page: str) -> str:
    return "/sign-in?" + urlencode({"next": next_page})


Anyone = Annotated[RequestContext, Depends(request_context)]
Reader = Annotated[RequestContext, Depends(reader)]
Operator = Annotated[RequestContext, Depends(operator)]
