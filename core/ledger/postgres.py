"""PostgreSQL connections with bounded waits. Needs the ``postgres`` extra.

Three bounds work together: the client's deadline (:mod:`core.ledger.time_limits`) for a silent server, TCP's for a
silent network, and the server's for a transaction whose client is gone. Sessions keep no state between transactions,
neither settings nor prepared statements: a pooler in transaction mode (PgBouncer) gives each transaction any free
connection.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Final

import psycopg
from psycopg.conninfo import timeout_from_conninfo
from sqlalchemy import URL, Connection, Engine, event

from core.ledger.time_limits import seconds_left

CONNECT_SECONDS: Final = 2
"""libpq's minimum connect_timeout, used unless a URL sets another."""
_CLIENT: Final[dict[str, str]] = {
    "connect_timeout": str(CONNECT_SECONDS),
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "5000",
    # initdb in the locale C makes SQL_ASCII databases, whose texts arrive as bytes unless an encoding is requested.
    "client_encoding": "UTF8",
}
"""libpq's parameters; tcp_user_timeout in milliseconds, others in seconds."""
_SERVER: Final[dict[str, int]] = {
    "lock_timeout": 3_000,
    "statement_timeout": 4_000,
    "idle_in_transaction_session_timeout": 30_000,
}
"""Milliseconds. A statement ends on the server before its client gives up, and a frozen client keeps no lock."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection on which every wait for the server ends at the calling thread's deadline."""

    def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """Drive a psycopg generator. Raises psycopg.OperationalError, and closes the connection, if the server was
        silent until the deadline."""
        return super().wait(self._bounded(gen), *args, **options)

    def _bounded(self, gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
        ready: Any = None
        while True:
            try:
                wanted = gen.send(ready)
            except StopIteration as end:
                return end.value
            ready = yield wanted
            if not ready and seconds_left() <= 0:
                self.pgconn.finish()  # a late answer would be taken for that of the next statement
                raise psycopg.OperationalError("the server was silent for too long; the connection was closed")


def bounded_url(url: URL) -> URL:
    return url.update_query_dict({key: value for key, value in _CLIENT.items() if key not in url.query})


def prepare_postgres(engine: Engine) -> None:
    """Bound an engine's connections and transactions, except for what the URL's ``options`` set."""
    own = str(engine.url.query.get("options", ""))
    bounds = "; ".join(f"set local {key} = {value}" for key, value in _SERVER.items() if key not in own)

    @event.listens_for(engine, "do_connect")
    def bounded(_dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        return connect(*arguments, **options)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if bounds:
            connection.exec_driver_sql(bounds)


def connect(*args: Any, **options: Any) -> BoundedConnection:
    """Open a connection within the caller's remaining time, which also caps ``connect_timeout``. Raises
    psycopg.OperationalError if there is no server, or it does not answer."""
    left = seconds_left()
    if left <= 0:
        raise psycopg.OperationalError("no time was left for a new connection")
    options["connect_timeout"] = int(min(timeout_from_conninfo(options), max(left, CONNECT_SECONDS)))
    return BoundedConnection.connect(*args, **options, prepare_threshold=None)
