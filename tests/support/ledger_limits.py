"""Limits of ledger calls in tests: wide ones, unless the test is about the limits.

A machine that runs many tests at once, including its PostgreSQL, pauses for seconds at times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import pytest

from core.ledger import database, time_limits

SECONDS = 60.0
"""A machine on which a call takes longer than this is broken, not busy."""
_PRODUCTION = {
    "CALL_SECONDS": time_limits.CALL_SECONDS, "CHECKOUT_SECONDS": time_limits.CHECKOUT_SECONDS,
    "LOOKUP_SECONDS": database.LOOKUP_SECONDS,
}  # fmt: skip


def patient_limits() -> AbstractContextManager[None]:
    return _limits(dict.fromkeys(_PRODUCTION, SECONDS))


def production_limits() -> AbstractContextManager[None]:
    """Apply the limits of production to calls inside, even within :func:`patient_limits`."""
    return _limits(_PRODUCTION)


@contextmanager
def _limits(limits: Mapping[str, float]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in limits.items():
            patch.setattr(database, name, seconds)
        yield


def patient(url: str) -> str:
    if not url.startswith("postgresql:"):
        return url
    milliseconds = round(SECONDS * 1000)
    options = "%20".join(f"-c%20{name}%3D{milliseconds}" for name in ("statement_timeout", "lock_timeout"))
    return f"{url}?connect_timeout={SECONDS:.0f}&options={options}"
