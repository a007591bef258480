"""Who asks, as far as it matters for the split of a canary."""

from __future__ import annotations

import uuid

from fastapi import Request

from core.access import Principal

KEY_HEADER = "x-ratchet-key"


def routing_key(request: Request, user: str | None = None) -> str:
    """A text that is the same for all requests of one caller: its API key, else what it says of itself in
    ``x-ratchet-key`` or in the body's ``user``, else the request alone. It is hashed at once and kept nowhere.

    A key counts where it is one of ours: OpenAI's clients send any text where none is needed, all of them the same.
    """
    caller: Principal | None = getattr(request.state, "principal", None)
    key = caller.key_id if caller is not None else None
    headers = request.headers
    return key or headers.get(KEY_HEADER) or user or headers.get("x-request-id") or uuid.uuid4().hex
