"""A PostgreSQL that tests may stop and restart, with an empty ledger in it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import create_engine, text

from core.ledger import Ledger
from tests.support.ledger_limits import patient, patient_limits, production_limits
from tests.support.postgres import PostgresServer, postgres_server


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture
def url(server: PostgresServer) -> str:
    """The URL of a new empty database."""
    engine = create_engine(
        server.url.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT",
        connect_args={"client_encoding": "utf8"},  # else texts are bytes where the locale is C
    )  # fmt: skip
    with engine.connect() as connection:
        connection.execute(text("drop database if exists ledger with (force)"))
        connection.execute(text("create database ledger"))
    engine.dispose()
    return server.url.rsplit("/", 1)[0] + "/ledger"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with patient_limits():
        opened = Ledger.open(patient(url))
        yield opened
        opened.close()


@pytest.fixture
def bounded(url: str, ledger: Ledger) -> Iterator[Ledger]:
    """The same ledger with the limits of production; that of a call holds only inside ``production_limits``."""
    with production_limits():
        opened = Ledger.lazy(url)
    yield opened
    opened.close()
