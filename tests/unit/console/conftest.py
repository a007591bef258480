"""Pages of a home without a server, beside other tests that take the processors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _patience() -> Iterator[None]:
    """A page waits for the store: its first call of the process imports Lance, which has taken more than 5 s here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ops.console.data.PATIENCE_SECONDS", 120.0)
        yield
