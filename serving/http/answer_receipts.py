"""Receipts of answers. The header ``x-ratchet-answer`` says who answered what and when, so that feedback can name the
answer. A receipt is signed with a key of the installation, so that nothing is stored, and has no content:

    a1.<base64url of: key, route, release, time, input, IDs of the samples found, in order; signature>
"""

from __future__ import annotations

import hmac
import struct
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import Final, Literal, get_args

from pydantic import SecretStr

from serving.http.errors import field_error

Route = Literal["embeddings", "classify", "search", "chat", "vqa", "rerank"]
HEADER: Final = "x-ratchet-answer"
PURPOSE: Final = b"ratchet answers v1"
PREFIX: Final = "a1."
ROUTES: Final[tuple[Route, ...]] = get_args(Route)
DAYS: Final = 30.0
MOST_SHOWN: Final = 50
"""IDs in a receipt, so that it fits into a header: 6 bytes each."""
MAX_CHARS: Final = 600
SKEW_SECONDS: Final = 300.0
_HEAD: Final = struct.Struct(">4sBII16s")
_ID: Final = 6
_SIGNATURE: Final = 16


@dataclass(frozen=True, slots=True)
class AnswerReceipt:
    key: str
    """Digest of the receipt, hex."""
    route: Route
    release: int
    at: datetime
    input: str
    """The first 16 bytes of the SHA-256 of the request's body, hex."""
    shown: tuple[str, ...]
    """The first 12 hex digits of the samples found, in order."""


class AnswerReceipts:
    def __init__(self, operator_key: SecretStr) -> None:
        self._key = hmac.digest(operator_key.get_secret_value().encode(), PURPOSE, "sha256")
        self._name = sha256(self._key).digest()[:4]

    def issue(self, route: Route, release: int, body: bytes, shown: Sequence[str] = ()) -> str:
        """``body``: of the request; ``shown``: IDs of samples, hex."""
        head = _HEAD.pack(self._name, ROUTES.index(route), release, int(time.time()), sha256(body).digest()[:16])
        data = head + b"".join(bytes.fromhex(each[: 2 * _ID]) for each in shown[:MOST_SHOWN])
        return _encoded(data + self._signature(data))

    def read(self, receipt: str) -> AnswerReceipt:
        """Raises ApiError: it is none, of another installation, changed, or too old."""
        raw = _decoded(receipt)
        data, signature = raw[:-_SIGNATURE], raw[-_SIGNATURE:]
        if len(data) < _HEAD.size:
            raise field_error("answer", f"this is no value of {HEADER}.", "invalid_answer")
        name, route, release, at, digest = _HEAD.unpack_from(data)
        if name != self._name:
            raise field_error(
                "answer",
                "another installation gave this answer, or the operator key has changed since.",
                "unknown_answer",
            )
        if not hmac.compare_digest(self._signature(data), signature):
            raise field_error("answer", "its signature is wrong: it was changed or cut short.", "invalid_answer")
        age = time.time() - at
        if age > DAYS * 86400 or age < -SKEW_SECONDS:
            raise field_error(
                "answer",
                f"answers can be reported for {DAYS:.0f} days, and this one is from {age / 86400:.0f} days ago.",
                "answer_expired",
            )
        ids = data[_HEAD.size :]
        shown = tuple(ids[start : start + _ID].hex() for start in range(0, len(ids), _ID))
        key, when = sha256(data).hexdigest(), datetime.fromtimestamp(at, UTC)
        return AnswerReceipt(key, ROUTES[route], release, when, digest.hex(), shown)

    def _signature(self, data: bytes) -> bytes:
        return hmac.digest(self._key, data, "sha256")[:_SIGNATURE]


def _encoded(raw: bytes) -> str:
    return PREFIX + urlsafe_b64encode(raw).decode()


def _decoded(receipt: str) -> bytes:
    """The bytes of a receipt; none if it is not their only encoding: Python's decoder passes over other characters."""
    try:
        raw = urlsafe_b64decode(receipt[:MAX_CHARS].removeprefix(PREFIX))
    except ValueError:
        return b""
    return raw if _encoded(raw) == receipt else b""
