"""Which failures of a fetch may pass, and how long to wait before the next try."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from core.errors import RecordError

RETRIED_STATUSES = frozenset({408, 425, 429, *range(500, 600)})
"""Answers that another try may change (RFC 9110, RFC 6585, RFC 8470)."""
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0


class TransientFetchError(RecordError):
    """An image could not be fetched now, and perhaps can be later. ``reason`` is ``uri_unreachable``.

    Args:
        message: what happened.
        retry_after: seconds that the server asked to wait.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__("uri_unreachable", message, "Check the address, or send the image itself.")
        self.retry_after = retry_after


def pause_before(retry: int, retry_after: float | None = None) -> float:
    """Seconds before try ``retry`` (1 for the first repetition).

    Exponential, with half of it random, so that images that failed together do not come back together; at least what
    the server asked for.
    """
    longest = min(FIRST_PAUSE_SECONDS * 2.0 ** (retry - 1), LONGEST_PAUSE_SECONDS)
    pause = longest * random.uniform(0.5, 1.0)  # noqa: S311
    return max(pause, retry_after or 0.0)


def parse_retry_after(text: str, now: datetime | None = None) -> float | None:
    """Seconds of a ``Retry-After`` header (a number or an HTTP date); None where it is neither."""
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        then = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    aware = then.replace(tzinfo=UTC) if then.tzinfo is None else then
    return max(0.0, (aware - (now or datetime.now(UTC))).total_seconds())
