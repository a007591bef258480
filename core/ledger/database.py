"""Transactions, migrations, and SQLite connections; PostgreSQL's are in :mod:`core.ledger.postgres`. After a connection
is lost during COMMIT, its outcome is unknown. Writes through :func:`write_once` take :func:`lock_releases` first: a
second attempt only gets that lock when the first has ended on the server, so what it then reads is final.

SQLite transactions declare at their start whether they write; files are in WAL mode, and durable.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from sqlalchemy import URL, Connection, Engine, Select, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import (
    ArgumentError,
    InterfaceError,
    InternalError,
    NoSuchModuleError,
    OperationalError,
    ProgrammingError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import InstrumentedAttribute, Session

from core.dependencies import outage_state
from core.errors import CommitUnknown, LedgerError, LedgerUnavailable
from core.files import make_private
from core.ledger.time_limits import CALL_SECONDS, CHECKOUT_SECONDS, MIGRATION_SECONDS, time_limit

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS = Path(__file__).parent / "migrations"
# Any fixed number: processes that start together migrate one after the other.
MIGRATION_LOCK = 7241957312
OUTAGES: Final = (OperationalError, InterfaceError, InternalError, PoolTimeout)
"""SQLAlchemy's errors for a database that is unreachable, silent, full, read-only or too busy."""
FIX: Final = "What is in service goes on. Bring the database back; nothing else needs to be done."

Result = TypeVar("Result")


class _SharedSession(threading.local):
    value: Session | None = None


class Database:
    """An engine with two kinds of transactions, ``read`` and ``write``. Both raise LedgerUnavailable if the database
    does not answer within :data:`core.ledger.time_limits.CALL_SECONDS`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._writing = engine.execution_options(ratchet_write=True)
        self._shared = _SharedSession()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view; inside :meth:`reading` it is that transaction's."""
        shared = self._shared.value
        with _outages(), time_limit(CALL_SECONDS):
            if shared is not None:
                yield shared
                return
            with Session(self.engine) as session:
                _check_out(session)
                yield session

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Share one transaction among all reads of this thread in the block: the connection is probed once, and each
        read takes one round trip instead of four. Do not write inside."""
        with self.read() as session:
            before, self._shared.value = self._shared.value, session
            try:
                yield
            finally:
                self._shared.value = before

    @contextmanager
    def write(self) -> Iterator[Session]:
        """An atomic transaction. Raises CommitUnknown if the response to COMMIT was lost, so that its outcome is
        unknown."""
        with _outages(), time_limit(CALL_SECONDS), Session(self._writing, expire_on_commit=False) as session:
            _check_out(session)
            yield session
            session.flush()
            try:
                session.commit()
            except OUTAGES as error:
                raise CommitUnknown(
                    f"the answer to COMMIT was lost ({_cause(error)}): whether it was carried out is not known.",
                    "Look it up in the ledger, or repeat the call, when the database is back.",
                ) from error

    def close(self) -> None:
        self.engine.dispose()


@contextmanager
def _outages() -> Iterator[None]:
    try:
        yield
    except OUTAGES as error:
        cause = _cause(error)
        raise LedgerUnavailable(f"the ledger cannot be used now: {cause}.", FIX, outage_state(cause)) from error


def _cause(error: Exception) -> str:
    words = str(getattr(error, "orig", None) or error).strip()
    return words.splitlines()[0].rstrip(".") if words else type(error).__name__


def _check_out(session: Session) -> None:
    with time_limit(CHECKOUT_SECONDS):
        session.connection()


def open_database(url: str, migrate: bool, check: bool = True) -> Database:
    """Connect to SQLite (WAL) or PostgreSQL and migrate; without ``check`` neither happens before the first call.
    Raises LedgerUnavailable if the database does not answer. Raises LedgerError if the URL is wrong, or the database is
    not migrated."""
    try:
        parsed = make_url(url)
        engine = _make_engine(parsed)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise LedgerError(
            f"ledger_url cannot be used: {error}",
            "Use sqlite:///PATH or postgresql://USER@HOST/DATABASE (pip install 'ratchet-server[postgres]').",
        ) from None
    database = Database(engine)
    if not check:
        return database
    try:
        if migrate:
            _migrate(database)
        with database.read() as session:
            session.execute(text("select 1 from releases limit 1"))
    except (*OUTAGES, LedgerUnavailable, ProgrammingError) as error:
        cause = error.__cause__ if isinstance(error, LedgerUnavailable) else error
        shown = parsed.render_as_string(hide_password=True)
        words = _cause(cause) if isinstance(cause, Exception) else str(error)
        message, fix = f"ledger {shown} cannot be used: {words}.", "Is the database up, and migrated?"
        if isinstance(error, ProgrammingError):
            raise LedgerError(message, fix) from None
        raise LedgerUnavailable(message, fix, outage_state(words)) from None
    return database


def _make_engine(url: URL) -> Engine:
    if url.get_backend_name() == "sqlite":
        if url.database:
            _make_file(Path(url.database))
        engine = create_engine(url, pool_timeout=CHECKOUT_SECONDS) if url.database else create_engine(url)
        _prepare_sqlite(engine)
        return engine
    if url.drivername not in ("postgresql", "postgresql+psycopg"):
        return create_engine(url, pool_pre_ping=True, pool_timeout=CHECKOUT_SECONDS)
    from core.ledger import postgres  # an extra

    bounded = postgres.bounded_url(url.set(drivername="postgresql+psycopg"))
    engine = create_engine(bounded, pool_pre_ping=True, pool_timeout=CHECKOUT_SECONDS)
    postgres.prepare_postgres(engine)
    return engine


def _make_file(path: Path) -> None:
    try:
        make_private(path)
    except OSError as error:
        words = error.strerror or str(error)
        fix = "Choose a folder that can be written: --set home=DIR, or RATCHET_HOME."
        raise LedgerUnavailable(f"ledger {path} cannot be made: {words}.", fix, outage_state(words)) from None


def alembic_config(connection: Connection | None = None) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def _migrate(database: Database) -> None:
    """Upgrade the schema. A newer Ratchet's schema is left alone: migrations only add, so that the software can be
    rolled back."""
    known = sorted(path.name.partition("_")[0] for path in MIGRATIONS.glob("versions/[0-9]*.py"))
    with time_limit(CALL_SECONDS), database.engine.connect() as connection:
        made = inspect(connection).has_table("alembic_version")
        revision = connection.scalar(text("select version_num from alembic_version")) if made else None
    if revision is not None and revision < known[0]:
        fix = "Nothing was published before: begin with an empty ledger."
        raise LedgerError(f"the ledger is at migration {revision}, older than the first version's {known[0]}.", fix)
    if revision == known[-1] or (revision is not None and revision not in known):
        return
    from alembic import command  # imported here: it takes long, and is rarely needed

    with time_limit(MIGRATION_SECONDS), database._writing.connect() as connection, connection.begin():
        lock_migrations(connection)
        command.upgrade(alembic_config(connection), "head")


def lock_migrations(connection: Connection) -> None:
    """Wait for other migrations, and allow this transaction :data:`MIGRATION_SECONDS`. SQLite has one writer anyway."""
    if connection.dialect.name == "postgresql":
        for bound in ("statement_timeout", "lock_timeout"):
            connection.execute(text(f"set local {bound} = '{MIGRATION_SECONDS:.0f}s'"))
        connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})


class Queries:
    database: Database

    def _all(self, query: Select[Result]) -> list[Result]:
        with self.database.read() as session:
            return list(session.scalars(query))

    def _first(self, query: Select[Result]) -> Result | None:
        with self.database.read() as session:
            return session.scalars(query.limit(1)).first()

    def _of_adapters(
        self, column: InstrumentedAttribute[Result | None], names: Sequence[str | None]
    ) -> dict[str, Result]:
        """A column's value by adapter, of those that have one."""
        wanted = [name for name in names if name is not None]
        query = select(column.class_.name, column).where(column.class_.name.in_(wanted), column.is_not(None))
        with self.database.read() as session:
            return {row[0]: row[1] for row in session.execute(query)}

    def _get(self, table: type[Result], key: object) -> Result | None:
        with self.database.read() as session:
            return session.get(table, key)


LOOKUP_SECONDS: Final = 5.0
"""Longest search for the outcome of a COMMIT; a restarted server is back in one or two seconds."""
_RELEASE_LOCK: Final = 7241957313
"""Any fixed number; serializes writes of releases, proposals and holds across processes."""
_PAUSE_SECONDS: Final = 0.1


def lock_releases(session: Session) -> None:
    """Block other writers of releases, proposals and holds until this transaction ends. SQLite has one writer
    anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("select pg_advisory_xact_lock(:key)"), {"key": _RELEASE_LOCK})


def write_once(database: Database, transaction: Callable[[Session, bool], Result], subject: str) -> Result:
    """Run a transaction exactly once, even if the response to its COMMIT is lost. ``transaction`` gets the session,
    under :func:`lock_releases`, and whether an earlier attempt may have been committed; if so it returns what that
    wrote, if found. Raises CommitUnknown if the database did not come back within :data:`LOOKUP_SECONDS`;
    LedgerUnavailable if it is unreachable, and nothing was written."""
    deadline, repeated = 0.0, False
    while True:
        try:
            with database.write() as session:
                lock_releases(session)
                return transaction(session, repeated)
        except LedgerUnavailable as error:
            if not repeated:
                if not isinstance(error, CommitUnknown):
                    raise
                deadline, repeated = time.monotonic() + LOOKUP_SECONDS, True
            if time.monotonic() >= deadline:
                raise CommitUnknown(
                    f"whether {subject} was written is unknown: {error.message}",
                    "Look it up when the ledger is back (`ratchet releases list`), before you decide again.",
                ) from error
        time.sleep(_PAUSE_SECONDS)


def insert_new(session: Session, key: InstrumentedAttribute[str], values: Mapping[str, Any]) -> bool:
    """Insert a row unless there is one with this ``key``, also if another transaction inserts it now. Returns whether
    it was inserted."""
    from sqlalchemy.dialects import postgresql, sqlite  # imported here: commands that only read start without them

    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    statement = dialect.insert(key.class_).values(**values).on_conflict_do_nothing(index_elements=[key])
    return session.scalars(statement.returning(key)).first() is not None


_SQLITE_WRITE_SECONDS: Final = 15
"""Longest wait for another process's write. A write takes milliseconds, but its process may have a low priority."""
_SQLITE_CACHE_KIB: Final = 256
"""Per connection. SQLite's 2 MB would fill up in every thread of every process; the kernel caches the pages once for
all."""
_SQLITE_READ_SECONDS: Final = 2
"""Longest wait of a read: in WAL mode it only waits for recovery after a crash."""


def _prepare_sqlite(engine: Engine) -> None:
    """Set up an engine's connections. Writers (``ratchet_write``) lock at once: SQLite upgrades a read to a write late,
    and then fails."""

    @event.listens_for(engine, "connect")
    def pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are started below, not by the driver
        connection.execute(f"PRAGMA busy_timeout={_SQLITE_WRITE_SECONDS * 1000}")
        _use_wal(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", f"cache_size=-{_SQLITE_CACHE_KIB}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("ratchet_write", False)
        seconds = _SQLITE_WRITE_SECONDS if writing else _SQLITE_READ_SECONDS
        connection.exec_driver_sql(f"PRAGMA busy_timeout={seconds * 1000}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _use_wal(connection: Any) -> None:
    """Switch to WAL. When two connections switch a new file, SQLite fails one with "locked" instead of waiting, so
    retry."""
    end = time.monotonic() + _SQLITE_WRITE_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
