"""Which callers a canary answers.

A caller's place between 0 and 1 is the SHA-256 of its key and of the canary's adapters. So a caller sees one side for
as long as these adapters are tried, every ingress agrees without asking, and a larger share only adds callers: whoever
was on the canary's side at a tenth is still there at a half. Other adapters draw other callers first.
"""

from __future__ import annotations

import hashlib


def canary_bucket(clip: str | None, vlm: str | None, key: str) -> float:
    """Where a caller stands, 0 to 1 (not included)."""
    digest = hashlib.sha256(f"{clip}\n{vlm}\n{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / (1 << 48)
