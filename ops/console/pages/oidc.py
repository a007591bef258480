"""Signing in by an OpenID Connect provider: there, and back with a key (authorization code flow with PKCE, Authlib)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import httpx2
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.starlette_client import OAuth, StarletteOAuth2App
from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response
from joserfc.errors import JoseError

from core.errors import AccessError
from core.settings.identity import Oidc
from core.settings.serving import Console
from ops.console.identities import issue_key
from ops.console.request_context import Anyone, Refused, RequestContext, local_path
from ops.console.sessions import Session

log = logging.getLogger("ratchet.console")
router = APIRouter()
DONE: Final = "/sign-in/oidc/done"
NEXT: Final = "next"
DISCOVERY: Final = "/.well-known/openid-configuration"
SECONDS: Final = 10.0
"""Longest that one call of the provider may take."""
HINT: Final = "id_token"
"""What a session that the provider signed in keeps: its token, by which the provider knows whose session is to end."""
MAX_HINT: Final = 2100
"""Characters. A cookie has room for a few more, but nginx and others have 4 KB for all headers of an answer, else they
answer 502. Without the token the provider asks who signs out."""
REFUSES_CONSOLE: Final = (
    "invalid_client", "unauthorized_client", "invalid_scope", "unsupported_response_type", "unsupported_grant_type",
)  # fmt: skip
"""Errors of the provider about the console (RFC 6749), which no user can change."""
OPERATORS: Final = "An operator of Ratchet has to correct {}."


def provider(console: Console) -> StarletteOAuth2App:
    """The client of the provider that the settings name."""
    rules = console.oidc
    return OAuth().register(
        "oidc",
        client_id=rules.client_id,
        client_secret=rules.client_secret and rules.client_secret.get_secret_value(),
        server_metadata_url=rules.issuer.rstrip("/") + DISCOVERY,
        client_kwargs={"scope": rules.scope, "code_challenge_method": "S256", "timeout": SECONDS},
    )


@router.get("/sign-in/oidc")
async def leave(context: Anyone, next: str = "/") -> Response:
    """To the provider. What is needed to come back goes into the session's cookie."""
    client = _client(context)
    remembered: dict[str, Any] = {}
    context.request.scope["session"] = remembered
    try:
        answer: Response = await client.authorize_redirect(context.request, _back(context))
    except (httpx2.HTTPError, ValueError, KeyError, RuntimeError) as error:
        raise _unusable(context, error) from error
    context.request.state.keep = Session(Session.new().csrf, "", {**remembered, NEXT: local_path(next)})
    return answer


@router.get(DONE)
async def arrive(context: Anyone) -> Response:
    """Back from the provider, with a code that it takes for who it is."""
    client, console = _client(context), context.data.settings.console
    remembered = dict(context.session.provider)
    next_page = local_path(str(remembered.pop(NEXT, "/")))
    context.request.scope["session"] = remembered
    try:
        token = await client.authorize_access_token(context.request)
        metadata = await client.load_server_metadata()
    except (OAuthError, JoseError) as error:
        log.warning("a sign-in failed: %s: %s", type(error).__name__, error)
        raise Refused(
            401, "That sign-in did not work", f"The provider's answer was not taken: {error}.",
            OPERATORS.format("console.oidc.client_id, its secret and scope") if error.error in REFUSES_CONSOLE
            else "Sign in again, in this browser and within minutes.",
        ) from error  # fmt: skip
    except (httpx2.HTTPError, ValueError, KeyError, RuntimeError) as error:
        raise _unusable(context, error) from error
    named = str(metadata["issuer"])
    if named.rstrip("/") != console.oidc.issuer.rstrip("/"):
        raise Refused(
            401, "That sign-in did not work",
            f"The provider calls itself {named}, which is not the one of the settings.",
            OPERATORS.format("console.oidc.issuer"),
        )  # fmt: skip
    claims = await _claims(client, token, console.oidc)
    if not claims:
        raise Refused(
            401, "That sign-in did not work", "The provider did not say who you are.",
            OPERATORS.format("console.oidc.scope, which has to name openid"),
        )  # fmt: skip
    try:
        key = await asyncio.to_thread(issue_key, context.data.ledger, claims, console.oidc, console.session_hours)
    except AccessError as error:
        raise Refused(403, "You may not sign in", error.message, error.fix) from error
    answer = RedirectResponse(next_page, 303)
    hint = str(token.get("id_token", ""))
    room = MAX_HINT - 3 * len(answer.headers["location"]) // 4  # four characters of a cookie hold three
    context.request.state.keep = replace(Session.new(key), provider={HINT: hint if len(hint) <= room else ""})
    return answer


async def end_session_url(context: RequestContext) -> str | None:
    """Where a browser ends the session of the provider; None where this sign-in was by a key, or the provider has no
    such place. Without a place to come back to, which would have to be registered there.
    """
    client: StarletteOAuth2App | None = context.request.app.state.provider
    if client is None or HINT not in context.session.provider:
        return None
    rules = context.data.settings.console.oidc
    try:
        made = await client.create_logout_url(
            id_token_hint=context.session.provider[HINT] or None, client_id=rules.client_id
        )
    except (httpx2.HTTPError, ValueError, KeyError, RuntimeError) as error:
        log.info("the session of the identity provider goes on: %s: %s", type(error).__name__, error)
        return None
    return str(made["url"])


async def _claims(client: StarletteOAuth2App, token: Mapping[str, Any], rules: Oidc) -> dict[str, Any]:
    """What the provider says of somebody: its token, and its userinfo for what is needed and the token lacks."""
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
    except (httpx2.HTTPError, OAuthError, ValueError, KeyError, RuntimeError) as error:
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
        raise Refused(404, "There is no such page", "No identity provider is set.", "See console.oidc.issuer.")
    return client


def _back(context: RequestContext) -> str:
    return context.data.settings.console.oidc.console_url.rstrip("/") + DONE


def _unusable(context: RequestContext, error: Exception) -> Refused:
    log.warning("the identity provider: %s: %s", type(error).__name__, error)
    status = error.response.status_code if isinstance(error, httpx2.HTTPStatusError) else 0
    if status >= 500 or isinstance(error, httpx2.TransportError):
        return Refused(
            503, "The identity provider does not answer", "It is away, or console.oidc.issuer is wrong.",
            "Try again, or sign in with an API key.",
        )  # fmt: skip
    issuer = context.data.settings.console.oidc.issuer
    return Refused(
        503, "The sign-in is not set up", f"What {issuer} answers is not that of an OpenID Connect provider.",
        OPERATORS.format("console.oidc.issuer") + " Until then sign in with an API key.",
    )  # fmt: skip
