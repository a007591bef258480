"""Exports the ledger to a file, and imports it into an empty database of either kind. SQLite uses its online backup;
PostgreSQL is written as JSON lines in one REPEATABLE READ transaction. Both are loaded into a database at the migration
of the export, which is then migrated."""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from alembic import command
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, Table, create_engine, func, insert, make_url, select, text

from core.errors import LedgerError
from core.ledger.database import alembic_config, lock_migrations, open_database

SQLITE: Final = "ledger.db"
LINES: Final = "ledger.jsonl.gz"
REVISION: Final = "alembic_version"
LEFT_OUT: Final = frozenset({REVISION, "leases"})
"""Leases belong to processes of the old installation."""
TOGETHER: Final = 500
Row = tuple[str, dict[str, Any]]


def write_ledger(url: str, folder: Path) -> tuple[Path, str]:
    """Write a consistent copy of a ledger in use; returns the file and its migration. Raises LedgerError when another
    version of Ratchet has migrated it, LedgerUnavailable."""
    with closing(open_database(url, migrate=False)) as database:
        if database.engine.dialect.name == "sqlite":
            target = folder / SQLITE
            path = str(make_url(url).database)
            with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(target)) as to:
                source.backup(to)  # in one step, which in WAL mode blocks no writer
            with _sqlite(target) as connection:
                return target, _revision(connection)
        target = folder / LINES
        options: dict[str, Any] = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with database.engine.connect().execution_options(**options) as connection, connection.begin():
            revision = _revision(connection)
            with gzip.open(target, "wt", compresslevel=3) as file:
                for table, row in _rows(connection):
                    file.write(json.dumps([table, row], default=_text) + "\n")
        return target, revision


def load_ledger(file: Path, revision: str, url: str, audit: dict[str, Any]) -> int:
    """Fill an empty ledger, all or nothing, and migrate it; returns the number of rows. ``revision``: the file's;
    ``audit``: columns of a row added to the audit log. Raises LedgerError when the ledger is not empty, or this version
    of Ratchet does not know the migration."""
    _check_known(revision)
    with closing(open_database(url, migrate=False, check=False)) as database:
        with database._writing.connect() as connection, connection.begin():
            lock_migrations(connection)
            _migrate_to(connection, revision)
            tables = _tables(connection)
            _check_empty(connection, tables)
            count = 0
            with _read(file) as rows:
                for table, group in groupby(rows, key=itemgetter(0)):
                    while values := [_typed(tables[table], row) for _, row in islice(group, TOGETHER)]:
                        connection.execute(insert(tables[table]), values)
                        count += len(values)
            _continue_numbers(connection, tables)
            connection.execute(insert(tables["audit"]), [_typed(tables["audit"], audit)])
        open_database(url, migrate=True).close()
        return count


def is_empty(url: str) -> bool:
    """True if a ledger has no rows or no tables yet. Raises LedgerError."""
    if make_url(url).get_backend_name() == "sqlite" and not Path(str(make_url(url).database)).exists():
        return True
    with closing(open_database(url, migrate=False, check=False)) as database, database.read() as session:
        connection = session.connection()
        return not _filled(connection, _tables(connection))


def _revision(connection: Connection) -> str:
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision is None:
        raise LedgerError("the ledger has no tables.", "Run `ratchet admin migrate`.")
    _check_known(revision)
    return revision


def _check_known(revision: str) -> None:
    script = ScriptDirectory.from_config(alembic_config())
    if revision not in {each.revision for each in script.walk_revisions()}:
        raise LedgerError(
            f"the ledger is at migration {revision}, which this version of Ratchet does not know.",
            "Use the version that made it, or a later one.",
        )


def _tables(connection: Connection) -> dict[str, Table]:
    """Tables as in the database, referenced ones first."""
    metadata = MetaData()
    metadata.reflect(connection)
    return {table.name: table for table in metadata.sorted_tables if table.name not in LEFT_OUT}


def _rows(connection: Connection) -> Iterator[Row]:
    for table in _tables(connection).values():
        query = select(table).order_by(*table.primary_key.columns)
        for row in connection.execution_options(yield_per=TOGETHER).execute(query).mappings():
            yield table.name, dict(row)


def _text(value: Any) -> str:
    if isinstance(value, datetime):
        return _utc(value).isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written")


def _utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


@contextmanager
def _read(file: Path) -> Iterator[Iterator[Row]]:
    if file.name == SQLITE:
        with _sqlite(file) as connection:
            yield _rows(connection)
    else:
        with gzip.open(file, "rt") as lines:
            yield ((table, row) for table, row in map(json.loads, lines))


@contextmanager
def _sqlite(file: Path) -> Iterator[Connection]:
    engine = create_engine(f"sqlite:///{file}")
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _typed(table: Table, row: dict[str, Any]) -> dict[str, Any]:
    def typed(name: str, value: Any) -> Any:
        if isinstance(value, str) and table.c[name].type.python_type is datetime:
            return datetime.fromisoformat(value)
        return _utc(value) if isinstance(value, datetime) else value

    return {name: typed(name, value) for name, value in row.items()}


def _migrate_to(connection: Connection, revision: str) -> None:
    """Bring the tables to the backup's migration; empty ones of another migration are made again."""
    if MigrationContext.configure(connection).get_current_revision() not in (None, revision):
        _check_empty(connection, _tables(connection))
        present = MetaData()
        present.reflect(connection)
        present.drop_all(connection)
    command.upgrade(alembic_config(connection), revision)


def _check_empty(connection: Connection, tables: dict[str, Table]) -> None:
    if full := _filled(connection, tables):
        raise LedgerError(
            f"the ledger is not empty: {', '.join(full)}.", "Restore into a new database, and start servers afterwards."
        )


def _filled(connection: Connection, tables: dict[str, Table]) -> list[str]:
    return [name for name, table in tables.items() if connection.execute(select(table).limit(1)).first() is not None]


def _continue_numbers(connection: Connection, tables: dict[str, Table]) -> None:
    """Advance PostgreSQL's sequences, which ignore inserted numbers."""
    if connection.dialect.name != "postgresql":
        return
    for table in tables.values():
        for column in table.primary_key.columns:
            name = connection.scalar(select(func.pg_get_serial_sequence(table.name, column.name)))
            highest = None if name is None else connection.scalar(select(func.max(column)))
            if highest is not None:
                statement = text("select setval(cast(:name as regclass), cast(:highest as bigint))")
                connection.execute(statement, {"name": name, "highest": highest})
