from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.postgres import PostgresServer, postgres_server, with_pgvector


@pytest.fixture(scope="session")
def pgvector() -> Iterator[PostgresServer]:
    """PostgreSQL 18 with pgvector."""
    with postgres_server(binaries=with_pgvector()) as server:
        yield server
