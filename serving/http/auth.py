"""Operators prove who they are with a bearer key, and say their name."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from fastapi import Request

from serving.http.errors import ApiError

MAX_ACTOR_CHARS = 100


@dataclass(frozen=True, slots=True)
class OperatorGate:
    """Checks ``Authorization: Bearer <operator key>`` in constant time; takes the name from ``x-ratchet-actor``."""

    key: str

    def actor(self, request: Request) -> str:
        """The operator's name.

        Raises:
            ApiError: 401 without the right key, 400 with a name that cannot be recorded.
        """
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.key.encode())
        if scheme.lower() != "bearer" or not right:
            raise ApiError(
                401, "this call needs the operator key: `Authorization: Bearer <key>` (home/operator.key).",
                code="invalid_operator_key", headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        name = request.headers.get("x-ratchet-actor", "operator").strip()
        if not name or len(name) > MAX_ACTOR_CHARS or not name.isprintable():
            raise ApiError(
                400, "x-ratchet-actor must be a name of 1 to 100 printable characters.", code="invalid_actor"
            )
        return name
