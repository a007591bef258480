"""Fixtures that every room of the tests may use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ops.testing.postgres import postgres


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real PostgreSQL, started once."""
    with postgres() as url:
        yield url
