"""Bodies of HTTP responses, read within bounds of size and of time."""

from __future__ import annotations

import time

import httpx

UNCOMPRESSED = {"accept-encoding": "identity"}
"""Headers of a request whose response :func:`bounded_body` reads: the bound is of the bytes that are sent."""


class BodyTooLarge(ValueError):
    """A body has more bytes than are read."""


def bounded_body(response: httpx.Response, max_bytes: int, seconds: float) -> bytes:
    """The body of a streamed response. A timeout of httpx is for each read alone: a server that drips never meets it.

    Raises:
        BodyTooLarge: it has more than ``max_bytes``.
        httpx.HTTPError: it takes longer than ``seconds``, or breaks off.
    """
    deadline = time.monotonic() + seconds
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(f"more than {max_bytes} bytes")
        if time.monotonic() > deadline:
            raise httpx.ReadTimeout("the body takes too long")
    return bytes(body)
