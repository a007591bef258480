"""The digest that names a sample."""

from __future__ import annotations

import hashlib


def digest_bytes(*parts: bytes | memoryview) -> str:
    """SHA-256 of the parts, each preceded by its length so that their borders count. 64 hex digits."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()
