"""The FastAPI application around a :class:`AppState`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.access import MAX_ACTOR_CHARS
from serving.http import (
    answer_receipts,
    chat,
    classify,
    deletions,
    docs,
    embeddings,
    errors,
    feedback,
    health,
    kserve,
    operations,
    records,
    rerank,
    search,
    spaces,
    ubi,
    vqa,
)
from serving.http.app_state import AppState
from serving.http.auth import AuthMiddleware
from serving.http.client_address import RateLimiter
from serving.http.health import Probes
from serving.http.operations import LastReleases
from serving.http.request_bodies import RequestBodies, RequestLimits
from serving.http.request_ids import ALPHABET, HEADER, MAX_CHARS, RequestIds

DESCRIPTION = """
A CLIP model and a vision-language model that keep learning, released only when regression tests pass.

Every answer names its release in `x-ratchet-release` and its adapter in `x-ratchet-adapter`; vectors of one release
belong together. Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`. Every answer, an error
too, has an `x-request-id`: the one you sent, or a new one. The server's log has it.

```python
from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
client.embeddings.create(model="clip", input=["a photo of a cat"])
client.chat.completions.create(model="vlm", messages=[{"role": "user", "content": "hello"}])
```

A server that other machines can reach needs a key: `Authorization: Bearer rk_...` (`ratchet keys create`).
"""
ACTOR = {
    "name": "x-ratchet-actor", "in": "header", "required": False, "description": "Actor, for the audit log.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ACTOR_CHARS},
}  # fmt: skip

REQUEST_ID = {
    "name": HEADER, "in": "header", "required": False,
    "description": "Your ID of the request. It is in the response and in the server's log.",
    "schema": {"type": "string", "pattern": f"^[{ALPHABET}]{{1,{MAX_CHARS}}}$", "minLength": 1, "maxLength": MAX_CHARS},
}  # fmt: skip
BEARER = HTTPBearer(auto_error=False, description="A key from `ratchet keys create`. Inference on loopback needs none.")
REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": errors.ErrorBody, "description": "The key is missing or invalid."},
    403: {"model": errors.ErrorBody, "description": "The key lacks the scope that this call needs."},
}


EXPOSED = (
    HEADER, "retry-after", "x-ratchet-release", "x-ratchet-adapter", "x-ratchet-image-space", "x-ratchet-text-space",
    answer_receipts.HEADER, "x-ratchet-truncated",
)  # fmt: skip
"""Headers of answers that scripts of web pages from ``serve.cors_origins`` may read."""


def build_app(state: AppState) -> FastAPI:
    made = _with_routes()
    app = FastAPI(title=made.title, routes=made.routes, openapi_url=None)  # includes the routes of the schema
    app.openapi_schema = made.openapi_schema
    app.state.ratchet = state
    app.state.probes = Probes(state)
    app.state.releases = LastReleases(lambda limit: state.ledger.releases(limit))
    errors.install(app)
    app.add_middleware(RequestBodies, settings=state.settings)  # innermost: Starlette runs the last one added first
    rates = RateLimiter(replicas=state.settings.ingress_replicas)
    app.add_middleware(AuthMiddleware, access=state.access, rates=rates)
    if state.settings.cors_origins:  # outside of the check of keys: preflights have none
        allowed: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"], "expose_headers": EXPOSED}
        app.add_middleware(CORSMiddleware, allow_origins=state.settings.cors_origins, **allowed)
    app.add_middleware(RequestLimits, settings=state.settings, proxies=state.proxies)
    # Outside of Starlette's handler of unexpected errors, which is outside of all added middleware.
    app.middleware_stack = RequestIds(_HeadRequests(app.build_middleware_stack()))
    return app


def openapi() -> dict[str, Any]:
    """The API's schema (OpenAPI 3.1), as in ``docs/openapi.json``."""
    return _with_routes().openapi()


@cache
def _with_routes() -> FastAPI:
    """Cached: FastAPI takes half a second to process all models."""
    app = FastAPI(title="Ratchet", version="1", description=DESCRIPTION, docs_url=None, redoc_url=None)
    inference = (chat, embeddings, spaces, vqa, classify, search, rerank, kserve)
    for part in (*inference, operations, feedback, ubi, records, deletions):
        # The middleware checks keys before any route; here the schema learns of them, for the "Authorize" of /docs.
        app.include_router(part.router, dependencies=[Depends(BEARER)], responses={**errors.RESPONSES, **REFUSALS})
    app.include_router(health.router)
    docs.add_to(app)
    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Add to the schema the headers of the middlewares: the request's ID, and an operator's name."""
    schema = app.openapi()
    schema["components"]["parameters"] = {HEADER: REQUEST_ID}
    answer_id = "The request's ID: yours if it is valid, else a new one."
    schema["components"]["headers"] = {HEADER: {"description": answer_id, "schema": REQUEST_ID["schema"]}}
    for path, calls in schema["paths"].items():
        for call in calls.values():
            actor = [ACTOR] if path.startswith("/admin/") else []
            own = {"$ref": f"#/components/parameters/{HEADER}"}
            call["parameters"] = [*call.get("parameters", ()), *actor, own]
            for answer in call["responses"].values():
                answer["headers"] = {HEADER: {"$ref": f"#/components/headers/{HEADER}"}}


@dataclass
class _HeadRequests:
    """Answers HEAD as GET without the body, with the headers of GET (``Content-Length`` too), as load balancers and
    monitors expect. Starlette does so for its own routes, not for FastAPI's."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        if scope["type"] == "http" and scope["method"] == "HEAD":
            await self.app({**scope, "method": "GET"}, receive, without_body)
        else:
            await self.app(scope, receive, send)
