"""Who asks, as far as it matters for the split of a canary."""

from __future__ import annotations

import uuid

from fastapi import Request

KEY_HEADER = "x-ratchet-key"


def caller_key(request: Request, user: str | None = None) -> str:
    """A text that is the same for all requests of one caller: its API key, else what it says of itself in
    ``x-ratchet-key`` or in the body's ``user``, else the request alone. It is hashed at once and kept nowhere.
    """
    headers = request.headers
    scheme, _, token = headers.get("authorization", "").partition(" ")
    key = token.strip() if scheme.lower() == "bearer" else ""
    return key or headers.get(KEY_HEADER) or user or headers.get("x-request-id") or uuid.uuid4().hex
