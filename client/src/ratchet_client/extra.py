"""Fields of a record that this version does not know: kept as they came, within bounds.

A producer may be newer than Ratchet. What its records hold beyond the fields of :class:`ratchet_client.records.Sample`
is kept in ``Sample.extra`` (name to JSON value), stored, shown and written again, and never trained on.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from datetime import date, datetime, time
from typing import Any, Final

MAX_FIELDS: Final = 64
MAX_BYTES: Final = 16 * 1024
"""All fields together, as :func:`dump_extra` writes them."""
MAX_DEPTH: Final = 8
MAX_NAME_CHARS: Final = 256


def check_extra(fields: object) -> dict[str, Any]:
    """A copy of ``fields`` in which every value is JSON.

    What JSON has no form for is written as Protobuf's JSON mapping does: bytes as base64, times in ISO 8601, numbers
    that are not finite as ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``; decimals and UUIDs as text.

    Raises:
        ValueError: names the field that is over a bound, or that is not text.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"extra is a {type(fields).__name__}, not an object")
    plain: dict[str, Any] = {}
    left = MAX_BYTES
    for name, value in fields.items():
        shown = repr(name)[:80]
        if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
            raise ValueError(
                f"the name {shown} of an unknown field is empty or longer than {MAX_NAME_CHARS} characters"
            )
        if len(plain) == MAX_FIELDS:
            raise ValueError(f"{shown} is one unknown field more than {MAX_FIELDS}")
        try:
            name.encode()
            plain[name] = _Plain(left).of(value)
        except UnicodeEncodeError:
            raise ValueError(f"unknown field {shown} holds half of a surrogate pair") from None
        except _TooLarge:
            raise ValueError(f"unknown field {shown} takes all unknown fields over {MAX_BYTES} bytes") from None
        except _TooDeep:
            raise ValueError(f"unknown field {shown} is nested deeper than {MAX_DEPTH}") from None
        left = MAX_BYTES - len(dump_extra(plain))
        if left < 0:
            raise ValueError(f"unknown field {shown} takes all unknown fields over {MAX_BYTES} bytes")
    return plain


def dump_extra(fields: Mapping[str, Any]) -> str:
    """JSON text with sorted names, in ASCII; empty where there are no fields."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":")) if fields else ""


class _TooLarge(Exception):
    """More bytes than are left."""


class _TooDeep(Exception):
    """More levels than allowed."""


class _Plain:
    """Copies one value; stops as soon as its JSON must be longer than ``left`` bytes, however large it is."""

    def __init__(self, left: int) -> None:
        self.left = left

    def of(self, value: Any, depth: int = 1) -> Any:
        if depth > MAX_DEPTH:
            raise _TooDeep
        if isinstance(value, Mapping):
            self._take(1)
            return {self.of(str(name)): self.of(each, depth + 1) for name, each in value.items()}
        if isinstance(value, (list, tuple)):
            self._take(1)
            return [self.of(each, depth + 1) for each in value]
        if isinstance(value, (bytes, bytearray)):
            self._take(len(value))
            return base64.b64encode(value).decode()
        return self._scalar(value)

    def _scalar(self, value: Any) -> Any:
        if value is None or isinstance(value, bool):
            self._take(1)
            return value
        if isinstance(value, int):
            self._take(value.bit_length() // 4)
            return value
        if isinstance(value, float):
            self._take(1)
            return value if math.isfinite(value) else {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN")
        text = value.isoformat() if isinstance(value, (datetime, date, time)) else str(value)
        self._take(len(text))
        text.encode()
        return text

    def _take(self, size: int) -> None:
        self.left -= size + 1  # a comma, a bracket or a quote at least
        if self.left < 0:
            raise _TooLarge
