"""The FastAPI application around a :class:`Gateway`."""

from __future__ import annotations

from fastapi import FastAPI

from serving.http import chat, classify, embeddings, errors, health, operations, search, vqa
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


def build_app(at: Gateway) -> FastAPI:
    """Routes, error shapes and bounds."""
    app = FastAPI(title="Ratchet", version="1", description=DESCRIPTION, redoc_url=None)
    app.state.gateway = at
    errors.install(app)
    for part in (chat, embeddings, vqa, classify, search, operations, health):
        app.include_router(part.router)
    app.add_middleware(
        Bounds,
        max_body_bytes=at.settings.max_body_bytes,
        max_requests=at.settings.queue,
        loopback_only=at.settings.host.startswith(LOOPBACK) or at.settings.host == "localhost",
    )
    return app
