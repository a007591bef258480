"""Signatures of the records that Ratchet itself sends, corrections and audited answers: a producer cannot claim their
sources."""

from __future__ import annotations

import hmac
from fnmatch import fnmatchcase
from typing import Final

HEADER: Final = "ratchet_signature"
FEEDBACK: Final = "feedback:"
AUDIT: Final = "audit"
"""Answers drawn at random that an operator has reviewed: see `feedback.audit_share`."""
SIGNED: Final = (f"{FEEDBACK}*", AUDIT)
"""Sources that only Ratchet itself gives."""


def is_signed(source: str) -> bool:
    return any(fnmatchcase(source, each) for each in SIGNED)


def sign(key: bytes, sample_id: str, source: str) -> bytes:
    """``key``: the sample store's secret; ``sample_id``: 64 hex digits, which stand for the content."""
    return hmac.digest(key, f"ratchet source {sample_id} {source}".encode(), "sha256").hex().encode()
