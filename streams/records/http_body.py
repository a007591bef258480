"""Bodies of HTTP responses, read within bounds of size and time."""

from __future__ import annotations

import time

import httpx

UNCOMPRESSED = {"accept-encoding": "identity"}
"""Request headers for responses that :func:`bounded_body` reads: it bounds the bytes as sent."""


class BodyTooLarge(ValueError):
    """A body exceeds the size limit."""


def bounded_body(response: httpx.Response, max_bytes: int, seconds: float) -> bytes:
    """Read the body of a streamed response. httpx's timeouts apply to single reads, so a server that drips would never
    hit one. Raises BodyTooLarge beyond ``max_bytes``; httpx.HTTPError if it takes longer than ``seconds``, or breaks
    off."""
    deadline = time.monotonic() + seconds
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(f"more than {max_bytes} bytes")
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("the body takes too long")
    return bytes(body)
