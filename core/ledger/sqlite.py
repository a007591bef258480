"""SQLite connections: WAL, durable, and transactions that say at their beginning whether they write."""

from __future__ import annotations

import sqlite3
import time
from typing import Any, Final

from sqlalchemy import Connection, Engine, event

WRITE_SECONDS: Final = 15
"""Longest wait for another process's write. A write takes milliseconds, but its process may run at a low priority."""
CACHE_KIB: Final = 256
"""Of each connection. SQLite's 2 MB fill up as the ledger grows, in every thread of every process; the kernel caches
its pages once for all."""
READ_SECONDS: Final = 2
"""Longest wait of a read: in WAL mode it waits for no writer, only for the recovery of the file after a crash."""


def prepare_sqlite(engine: Engine) -> None:
    """Set up every connection of an engine. Writers (``ratchet_write``) lock at once: SQLite upgrades a read to a
    write late, and then fails."""

    @event.listens_for(engine, "connect")
    def pragmas(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        connection.execute(f"PRAGMA busy_timeout={WRITE_SECONDS * 1000}")
        _use_wal(connection)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", f"cache_size=-{CACHE_KIB}"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writing = connection.get_execution_options().get("ratchet_write", False)
        seconds = WRITE_SECONDS if writing else READ_SECONDS
        connection.exec_driver_sql(f"PRAGMA busy_timeout={seconds * 1000}")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _use_wal(connection: Any) -> None:
    """SQLite does not wait when two connections turn a new file to WAL: one is told "locked", and asks again."""
    end = time.monotonic() + WRITE_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
            time.sleep(0.01)
