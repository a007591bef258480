"""A ledger on SQLite and on PostgreSQL, for all unit tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from core.ledger import Ledger
from tests.support.ledger_limits import patient, patient_limits


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return create_database(request.getfixturevalue("postgres_url"), f"t{abs(hash(tmp_path))}")


@pytest.fixture
def ascii_url(postgres_url: str, tmp_path: Path) -> str:
    encoding = "encoding 'SQL_ASCII' lc_collate 'C' lc_ctype 'C' template template0"
    return create_database(postgres_url, f"t{abs(hash(tmp_path))}", encoding)


def create_database(server: str, name: str, options: str = "") -> str:
    engine = create_engine(
        server.replace("postgresql:", "postgresql+psycopg:"), isolation_level="AUTOCOMMIT",
        connect_args={"client_encoding": "UTF8"},
    )  # fmt: skip
    with engine.connect() as connection:
        connection.execute(text(f"create database {name} {options}"))
    engine.dispose()
    return server.rsplit("/", 1)[0] + f"/{name}"


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    with patient_limits():
        opened = Ledger.open(patient(url))
        yield opened
        opened.close()
