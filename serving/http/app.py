"""The FastAPI application around a :class:`Gateway`."""

from __future__ import annotations

from fastapi import FastAPI

from serving.http import chat, classify, embeddings, errors, health, operations, search, vqa
from serving.http.auth import MAX_ACTOR_CHARS
from serving.http.gateway import Gateway
from serving.http.limits import LOOPBACK, Bounds

DESCRIPTION = """
A CLIP model and a vision-language model that keep learning and never slip back.

Every answer names its release in `x-ratchet-release` and its adapter in `x-ratchet-adapter`; vectors of one release
belong together. Errors have OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

```python
from openai import OpenAI
client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="unused")
client.embeddings.create(model="clip", input=["a photo of a cat"])
client.chat.completions.create(model="vlm", messages=[{"role": "user", "content": "hello"}])
```
"""
ACTOR = {
    "name": "x-ratchet-actor", "in": "header", "required": False, "description": "Who decides; goes into the audit.",
    "schema": {"type": "string", "minLength": 1, "maxLength": MAX_ACTOR_CHARS},
}  # fmt: skip


def build_app(at: Gateway) -> FastAPI:
    """Routes, error shapes and bounds."""
    app = FastAPI(title="Ratchet", version="1", description=DESCRIPTION, redoc_url=None)
    app.state.gateway = at
    errors.install(app)
    for part in (chat, embeddings, vqa, classify, search, operations, health):
        app.include_router(part.router, responses=errors.RESPONSES)
    app.add_middleware(
        Bounds,
        max_body_bytes=at.settings.max_body_bytes,
        max_requests=at.settings.queue,
        loopback_only=at.settings.host.startswith(LOOPBACK) or at.settings.host == "localhost",
    )
    _describe(app)
    return app


def _describe(app: FastAPI) -> None:
    """Say in the schema which calls need the operator key."""
    schema = app.openapi()
    schemes = schema["components"].setdefault("securitySchemes", {})
    schemes["operator"] = {"type": "http", "scheme": "bearer", "description": "The operator key."}
    for path, calls in schema["paths"].items():
        if path.startswith("/admin/"):
            for call in calls.values():
                call["security"] = [{"operator": []}]
                call["parameters"] = [*call.get("parameters", ()), ACTOR]
