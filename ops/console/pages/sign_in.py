"""Sign-in with an API key or an OpenID Connect provider, and sign-out. The provider is used by the authorization code
flow with PKCE (Authlib). Server, audit log and `ratchet keys` only know keys, so such a sign-in makes one: named after
the person, with the scopes of the settings, valid for `console.session_hours`. Revoking it ends the session."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import httpx2
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.starlette_client import OAuth, StarletteOAuth2App
from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response
from joserfc.errors import JoseError

from core.errors import AccessError, LedgerUnavailable
from core.ledger import Ledger
from core.ledger.rows import KeyScope
from core.settings.identity import Oidc
from core.settings.serving import Console
from ops.console.request_context import LOOK, Anyone, ErrorPage, RequestContext, local_path
from ops.console.security import MAX_KEY_CHARS, Session
from serving.http.client_address import came_by_tls

log = logging.getLogger("ratchet.console")
router = APIRouter()
DONE: Final = "/sign-in/oidc/done"
NEXT: Final = "next"
SECONDS: Final = 10.0
HINT: Final = "id_token"
"""The provider's token kept in the session: it identifies the session to end."""
MAX_HINT: Final = 2100
"""Characters. A cookie holds a few more, but nginx and others answer 502 when all headers of a response exceed 4 KB.
Without the token the provider asks who signs out."""
REFUSES_CONSOLE: Final = (
    "invalid_client", "unauthorized_client", "invalid_scope", "unsupported_response_type", "unsupported_grant_type",
)  # fmt: skip
"""Errors of the provider about the console (RFC 6749), which no user can fix."""
OPERATORS: Final = "An operator of Ratchet has to correct {}."
READ: Final[tuple[KeyScope, ...]] = ("infer", "search")
ACT: Final[tuple[KeyScope, ...]] = (*READ, "publish", "operate")
ISSUER: Final = "ratchet"
"""Creator of such keys in the ledger."""
NAME_CHARS: Final = 50
MOST_GROUPS: Final = 50
GROUP_CHARS: Final = 200
"""Limits for group names in an audit row."""
UNUSABLE: Final = (httpx2.HTTPError, ValueError, KeyError, RuntimeError)
"""Raised by Authlib if the provider is unavailable or answers unlike one."""


@router.get("/sign-in")
def ask(context: Anyone, next: str = "/") -> Response:
    return _form(context, next)


@router.post("/sign-in")
def sign_in(
    context: Anyone, key: Annotated[str, Form(max_length=MAX_KEY_CHARS)], next: Annotated[str, Form()] = "/"
) -> Response:
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
    """Forget the key. If the identity provider signed in, also revoke the key and end the provider's session."""
    if context.principal is not None and context.data.settings.console.oidc.enabled:
        with suppress(LedgerUnavailable):
            await asyncio.to_thread(end_key, context.data.ledger, context.principal.key_id)
    url = await _end_session_url(context)
    context.request.state.keep = Session.new()
    if url is None:
        return RedirectResponse("/", 303)
    # A page that redirects: forms may not lead to another site (security.POLICY).
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
    """True if the browser will refuse the session cookie, which requires TLS."""
    secure = came_by_tls(request.scope) or request.url.hostname in ("localhost", "127.0.0.1", "::1")
    return not request.app.state.local and not secure


def provider(console: Console) -> StarletteOAuth2App:
    rules = console.oidc
    return OAuth().register(
        "oidc",
        client_id=rules.client_id,
        client_secret=rules.client_secret and rules.client_secret.get_secret_value(),
        server_metadata_url=rules.issuer.rstrip("/") + "/.well-known/openid-configuration",
        client_kwargs={"scope": rules.scope, "code_challenge_method": "S256", "timeout": SECONDS},
    )


@router.get("/sign-in/oidc")
async def leave(context: Anyone, next: str = "/") -> Response:
    """Redirect to the provider. The state for the return is kept in the session's cookie."""
    client = _client(context)
    back = context.data.settings.console.oidc.console_url.rstrip("/") + DONE
    remembered: dict[str, Any] = {}
    context.request.scope["session"] = remembered
    try:
        answer: Response = await client.authorize_redirect(context.request, back)
    except UNUSABLE as error:
        raise _unusable(context, error) from error
    context.request.state.keep = Session(Session.new().csrf, "", {**remembered, NEXT: local_path(next)})
    return answer


@router.get(DONE)
async def arrive(context: Anyone) -> Response:
    """Handle the provider's redirect: exchange its code for the person's claims."""
    client, console = _client(context), context.data.settings.console
    remembered = dict(context.session.provider)
    next_page = local_path(str(remembered.pop(NEXT, "/")))
    context.request.scope["session"] = remembered
    try:
        token = await client.authorize_access_token(context.request)
        metadata = await client.load_server_metadata()
    except (OAuthError, JoseError) as error:
        log.warning("a sign-in failed: %s: %s", type(error).__name__, error)
        setting = "console.oidc.client_id, its secret and scope" if error.error in REFUSES_CONSOLE else ""
        raise _failed(f"The provider's answer was not taken: {error}.", setting) from error
    except UNUSABLE as error:
        raise _unusable(context, error) from error
    named = str(metadata["issuer"])
    if named.rstrip("/") != console.oidc.issuer.rstrip("/"):
        raise _failed(
            f"The provider calls itself {named}, which is not the one of the settings.", "console.oidc.issuer"
        )
    claims = await _claims(client, token, console.oidc)
    if not claims:
        raise _failed("The provider did not say who you are.", "console.oidc.scope, which has to name openid")
    try:
        key = await asyncio.to_thread(issue_key, context.data.ledger, claims, console.oidc, console.session_hours)
    except AccessError as error:
        raise ErrorPage(403, "You may not sign in", error.message, error.fix) from error
    answer = RedirectResponse(next_page, 303)
    hint = str(token.get("id_token", ""))
    room = MAX_HINT - 3 * len(answer.headers["location"]) // 4  # four characters of a cookie hold three
    context.request.state.keep = replace(Session.new(key), provider={HINT: hint if len(hint) <= room else ""})
    return answer


async def _end_session_url(context: RequestContext) -> str | None:
    """URL that ends the provider's session in the browser; None after a sign-in by key, or if the provider has none. It
    names no page to return to, which would have to be registered there."""
    client: StarletteOAuth2App | None = context.request.app.state.provider
    if client is None or HINT not in context.session.provider:
        return None
    rules = context.data.settings.console.oidc
    try:
        made = await client.create_logout_url(
            id_token_hint=context.session.provider[HINT] or None, client_id=rules.client_id
        )
    except UNUSABLE as error:
        log.info("the session of the identity provider goes on: %s: %s", type(error).__name__, error)
        return None
    return str(made["url"])


async def _claims(client: StarletteOAuth2App, token: Mapping[str, Any], rules: Oidc) -> dict[str, Any]:
    """Claims of the token, with needed ones that it lacks from userinfo."""
    claims = dict(token.get("userinfo") or {})
    wanted = {rules.name_claim}
    if rules.name_claim == "email" and not rules.trust_emails:
        wanted.add("email_verified")
    if rules.reader_groups or rules.operator_groups:
        wanted.add(rules.groups_claim)
    if not claims or wanted <= claims.keys():
        return claims
    try:
        told = dict(await client.userinfo(token=token))
    except (OAuthError, *UNUSABLE) as error:
        log.warning("userinfo of the identity provider: %s: %s", type(error).__name__, error)
        return claims
    if told.get("sub") != claims.get("sub"):
        return claims
    if told.get("email") != claims.get("email", told.get("email")):
        told.pop("email_verified", None)  # it is about another address
    return {**told, **claims}


def _client(context: RequestContext) -> StarletteOAuth2App:
    client: StarletteOAuth2App | None = context.request.app.state.provider
    if client is None:
        raise ErrorPage(404, "There is no such page", "No identity provider is set.", "See console.oidc.issuer.")
    return client


def _failed(message: str, setting: str) -> ErrorPage:
    """``setting``: what an operator has to correct; empty if the user can try again."""
    fix = OPERATORS.format(setting) if setting else "Sign in again, in this browser and within minutes."
    return ErrorPage(401, "That sign-in did not work", message, fix)


def _unusable(context: RequestContext, error: Exception) -> ErrorPage:
    log.warning("the identity provider: %s: %s", type(error).__name__, error)
    status = error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else 0
    if status >= 500 or isinstance(error, httpx2.TransportError):
        return ErrorPage(
            503, "The identity provider does not answer", "It is away, or console.oidc.issuer is wrong.",
            "Try again, or sign in with an API key.",
        )  # fmt: skip
    issuer = context.data.settings.console.oidc.issuer
    return ErrorPage(
        503, "The sign-in is not set up", f"What {issuer} answers is not that of an OpenID Connect provider.",
        OPERATORS.format("console.oidc.issuer") + " Until then sign in with an API key.",
    )  # fmt: skip


def scopes_of(claims: Mapping[str, Any], rules: Oidc) -> tuple[KeyScope, ...]:
    """Scopes that the settings give a person; none if they name neither the person nor a group of theirs. Raises
    AccessError when the provider sent no name, or has not verified the address."""
    name, groups = person(claims, rules), groups_of(claims, rules)
    if name in rules.operators or not groups.isdisjoint(rules.operator_groups):
        return ACT
    reads = name in rules.readers or "*" in rules.readers or not groups.isdisjoint(rules.reader_groups)
    return READ if reads else ()


def person(claims: Mapping[str, Any], rules: Oidc) -> str:
    """The person's name in settings and audit log. Raises AccessError, see :func:`scopes_of`."""
    name = claims.get(rules.name_claim)
    if not isinstance(name, str) or not name.strip():
        raise AccessError(
            f"the provider sent no claim {rules.name_claim!r}.", "See console.oidc.name_claim and console.oidc.scope."
        )
    if rules.name_claim == "email" and claims.get("email_verified") is not True and not rules.trust_emails:
        raise AccessError(
            f"the provider does not say that it verified the address {name!r}.",
            "Verify it there, and sign in again. An operator can set console.oidc.trust_emails where users cannot "
            "choose their address, or another console.oidc.name_claim.",
        )
    return name.strip()


def issue_key(ledger: Ledger, claims: Mapping[str, Any], rules: Oidc, hours: float) -> str:
    """Make the key of one sign-in; returns its token. Raises AccessError without a right to sign in,
    LedgerUnavailable."""
    name, scopes, groups = person(claims, rules), scopes_of(claims, rules), sorted(groups_of(claims, rules))
    if not scopes:
        raise AccessError(
            f"{name} may not use this console. Groups that the provider sent: {', '.join(groups) or 'none'}.",
            "An operator can name the person in console.oidc.readers, or a group in console.oidc.reader_groups.",
        )
    letters = re.sub(r"[^a-z0-9._@-]", "-", name.lower())[:NAME_CHARS].lstrip("._@-") or "somebody"
    row, token = ledger.create_key(f"{letters}.{secrets.token_hex(4)}", scopes, actor=ISSUER, days=hours / 24)
    detail = {"issuer": rules.issuer, "subject": str(claims.get("sub"))}
    shown = [each[:GROUP_CHARS] for each in groups[:MOST_GROUPS]]
    ledger.audit(f"key:{row.name}", "sign in", "console", {**detail, "groups": shown})
    return token


def end_key(ledger: Ledger, key_id: str | None) -> None:
    """Revoke a key made by :func:`issue_key`; those of `ratchet keys` stay."""
    if any(row.id == key_id and row.actor == ISSUER for row in ledger.api_keys()):
        ledger.revoke_key(str(key_id), actor=ISSUER, reason="signed out")


def groups_of(claims: Mapping[str, Any], rules: Oidc) -> set[str]:
    """Groups of a person; Keycloak's begin with a slash unless its mapper omits the path."""
    value = claims.get(rules.groups_claim)
    values = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return {each for each in values if isinstance(each, str)}
