"""The FastAPI application around a :class:`AppState`."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from ops.access import MAX_ACTOR_CHARS
from serving.http import (
    chat,
    classify,
    deletions,
    embeddings,
    errors,
    health,
    operations,
    quarantine,
    records,
    search,
    vqa,
)
from serving.http.app_state import AppState
from serving.http.auth import AuthMiddleware
from serving.http.limits import RequestLimits
from serving.http.rate_limit import RateLimiter
from serving.http.request_bodies import RequestBodies

DESCRIPTION = """
A CLIP model and a vision-language model that keep learning, released only when regression tests pass.

Every answer names its release in `x-ratchet-release` and its adapter in `x-ratchet-adapter`; vectors of one release
belong together. Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

```python
from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
client.embeddings.create(model="clip", input=["a photo of a cat"])
client.chat.completions.create(model="vlm", messages=[{"role": "user", "content": "hello"}])
```

A server that other machines can reach needs a key: `Authorization: Bearer rk_...` (`ratchet keys create`).
"""
ACTOR = {
    "name": "x-ratchet-actor", "in": "header", "required": False, "description": "Who decides; goes into the audit.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ACTOR_CHARS},
}  # fmt: skip

BEARER = HTTPBearer(auto_error=False, description="A key of `ratchet keys create`. Not needed on loopback to infer.")
REFUSALS: dict[int | str, dict[str, Any]] = {
    401: {"model": errors.ErrorBody, "description": "No key, or one that is not valid."},
    403: {"model": errors.ErrorBody, "description": "The key has not the scope that this call needs."},
}


def build_app(state: AppState) -> FastAPI:
    """Routes, error shapes and bounds."""
    app = _with_routes()
    app.state.ratchet = state
    errors.install(app)
    app.add_middleware(RequestBodies, settings=state.settings)  # the innermost: what is added last comes first
    rates = RateLimiter(replicas=state.settings.ingress_replicas)
    app.add_middleware(AuthMiddleware, access=state.access, rates=rates)
    app.add_middleware(RequestLimits, settings=state.settings, proxies=state.proxies)
    return app


def openapi() -> dict[str, Any]:
    """The API's schema (OpenAPI 3.1), as ``docs/openapi.json`` has it."""
    return _with_routes().openapi()


def _with_routes() -> FastAPI:
    app = FastAPI(title="Ratchet", version="1", description=DESCRIPTION, redoc_url=None)
    for part in (chat, embeddings, vqa, classify, search, operations, quarantine, records, deletions):
        # The middleware checks keys before any route; here the schema learns of them, for the "Authorize" of /docs.
        app.include_router(part.router, dependencies=[Depends(BEARER)], responses={**errors.RESPONSES, **REFUSALS})
    app.include_router(health.router)
    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Add the header with an operator's name to the schema."""
    for path, calls in app.openapi()["paths"].items():
        if path.startswith("/admin/"):
            for call in calls.values():
                call["parameters"] = [*call.get("parameters", ()), ACTOR]
