"""Connections, transactions and migrations."""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from ops.errors import LedgerError, LedgerUnavailable

MIGRATIONS = Path(__file__).parent / "migrations"
# Any fixed number: processes that start together take turns at migrating.
MIGRATION_LOCK = 7241957312
SQLITE_BUSY_SECONDS = 15

Row = TypeVar("Row")


class Database:
    """An engine with two kinds of transactions: ``read`` and ``write``."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # SQLite upgrades a read to a write late and then fails; writers therefore lock at once.
        self._writing = engine.execution_options(ratchet_write=True)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view."""
        with Session(self.engine) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """All or nothing."""
        with Session(self._writing) as session, session.begin():
            yield session

    def close(self) -> None:
        """Close pooled connections."""
        self.engine.dispose()


@contextmanager
def waiting_for_ledger() -> Iterator[None]:
    """What a database that is away, locked or full raises inside becomes an error like other outages.

    Raises:
        LedgerUnavailable: to be tried again.
    """
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        reason = str(getattr(error, "orig", None) or error)[:300]
        raise LedgerUnavailable(
            f"the ledger cannot be read or written: {reason}.",
            "Bring its database back, or free its disk (`ledger_url`); nothing is lost.",
        ) from error


def open_database(url: str, migrate: bool) -> Database:
    """Connect to SQLite (WAL) or PostgreSQL and migrate. Raises LedgerError."""
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        sqlite = parsed.get_backend_name() == "sqlite"
        if sqlite and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed, pool_pre_ping=not sqlite)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise LedgerError(
            f"ledger_url cannot be used: {error}",
            "Use sqlite:///PATH or postgresql://USER@HOST/DATABASE (pip install 'ratchet[postgres]').",
        ) from None
    if sqlite:
        _prepare_sqlite(engine)
    database = Database(engine)
    try:
        if migrate:
            _migrate(database)
        with database.read() as session:
            session.execute(text("select 1 from releases limit 1"))
    except OperationalError as error:
        shown = parsed.render_as_string(hide_password=True)
        raise LedgerError(f"ledger {shown} cannot be used: {error.orig}", "Is the database up, and migrated?") from None
    return database


def _prepare_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute(f"PRAGMA busy_timeout={SQLITE_BUSY_SECONDS * 1000}")
        _use_wal(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("ratchet_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _use_wal(connection: Any) -> None:
    """SQLite does not wait when two connections turn a new file to WAL: one is told "locked", and asks again."""
    end = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)


def alembic_config(connection: Connection | None = None) -> Config:
    """Alembic's settings for the migrations in this package."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _migrate(database: Database) -> None:
    """Bring the schema up to date. One that a newer Ratchet has made is left alone: migrations only add, so that the
    software can be rolled back.
    """
    script = ScriptDirectory.from_config(alembic_config())
    with database.engine.connect() as connection:
        revision = MigrationContext.configure(connection).get_current_revision()
    known = {each.revision for each in script.walk_revisions()}
    if revision == script.get_current_head() or (revision is not None and revision not in known):
        return
    with database._writing.connect() as connection, connection.begin():
        if connection.dialect.name == "postgresql":
            connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        command.upgrade(alembic_config(connection), "head")


def as_row(kind: type[Row], source: Any) -> Row:
    """Copy the columns of a mapped object into a frozen row."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    return kind(**{field.name: getattr(source, field.name) for field in fields})
