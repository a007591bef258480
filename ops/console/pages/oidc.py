"""Signing in by an OpenID Connect provider: there, and back with a key (authorization code flow with PKCE, Authlib)."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import httpx2
from authlib.integrations.base_client.errors import OAuthError
from authlib.integrations.starlette_client import OAuth, StarletteOAuth2App
from fastapi import APIRouter
from fastapi.responses import RedirectResponse, Response
from joserfc.errors import JoseError

from ops.console.identities import issue_key
from ops.console.request_context import Anyone, Refused, RequestContext, local_path
from ops.console.sessions import Session
from ops.errors import AccessError
from ops.settings.serving import Console

log = logging.getLogger("ratchet.console")
router = APIRouter()
DONE: Final = "/sign-in/oidc/done"
NEXT: Final = "next"
DISCOVERY: Final = "/.well-known/openid-configuration"
SECONDS: Final = 10.0
"""Longest that one call of the provider may take."""


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
        raise _away(error) from error
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
            "Sign in again, in this browser and within minutes.",
        ) from error  # fmt: skip
    except (httpx2.HTTPError, ValueError, KeyError, RuntimeError) as error:
        raise _away(error) from error
    claims = token.get("userinfo")
    if not claims or str(metadata["issuer"]).rstrip("/") != console.oidc.issuer.rstrip("/"):
        raise Refused(401, "That sign-in did not work", "The provider did not say who you are.", "Ask its operators.")
    try:
        key = await asyncio.to_thread(issue_key, context.data.ledger, claims, console.oidc, console.session_hours)
    except AccessError as error:
        raise Refused(403, "You may not sign in", error.message, error.fix) from error
    context.request.state.keep = Session.new(key)
    return RedirectResponse(next_page, 303)


def _client(context: RequestContext) -> StarletteOAuth2App:
    client: StarletteOAuth2App | None = context.request.app.state.provider
    if client is None:
        raise Refused(404, "There is no such page", "No identity provider is set.", "See console.oidc.issuer.")
    return client


def _back(context: RequestContext) -> str:
    return context.data.settings.console.oidc.console_url.rstrip("/") + DONE


def _away(error: Exception) -> Refused:
    log.warning("the identity provider: %s: %s", type(error).__name__, error)
    return Refused(
        503, "The identity provider does not answer", "It is away, or console.oidc.issuer is wrong.",
        "Try again, or sign in with an API key.",
    )  # fmt: skip
