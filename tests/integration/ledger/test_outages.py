"""A database that is down, silent or busy makes a call fail within its limit, with one error."""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from core.errors import LedgerError, LedgerUnavailable
from core.ledger import Ledger
from core.ledger.time_limits import CALL_SECONDS, time_limit
from tests.support.ledger_limits import production_limits
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.integration


LATE = 4 * CALL_SECONDS
"""A call with a limit ends within this even on a busy machine; a call without one waits half a minute or for ever."""


@contextmanager
def _in_time() -> Iterator[None]:
    began = time.monotonic()
    with production_limits():
        yield
    assert time.monotonic() - began < LATE


@pytest.mark.parametrize("call", [Ledger.live, lambda ledger: ledger.hold("ann", "incident")])
def test_a_server_that_is_stopped_fails_a_call_within_the_bound_also_within_a_transaction(
    server: PostgresServer, bounded: Ledger, call: Callable[[Ledger], object]
) -> None:
    call(bounded)
    with server.suspended(), _in_time(), pytest.raises(LedgerUnavailable) as caught:
        call(bounded)
    assert caught.value.fix
    call(bounded)
    with pytest.raises(LedgerUnavailable), bounded.database.write() as session:
        session.execute(text("select 1"))
        with server.suspended(), _in_time(), time_limit(1):
            session.execute(text("select 1"))
    call(bounded)


def test_a_call_made_while_every_connection_hangs_is_bounded_too(server: PostgresServer, bounded: Ledger) -> None:
    bounded.live()
    errors: list[BaseException] = []

    def call() -> None:
        try:
            bounded.live()
        except LedgerError as error:
            errors.append(error)

    threads = [threading.Thread(target=call) for _ in range(20)]
    with server.suspended(), _in_time():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [type(error) for error in errors] == [LedgerUnavailable] * 20


@pytest.mark.parametrize("query", ["", "?connect_timeout=60"])
def test_a_socket_that_accepts_and_is_silent_is_an_unavailable_ledger(query: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, _in_time(), pytest.raises(LedgerUnavailable):
        Ledger.open(f"postgresql://ratchet:hunter2@127.0.0.1:{silent.getsockname()[1]}/ledger{query}")


def test_a_row_that_somebody_has_locked_is_waited_for_until_the_server_ends_it(bounded: Ledger) -> None:
    bounded.acquire_lease("job", "a", 60)
    with bounded.database.engine.connect() as other:
        other.execute(text("select * from leases for update"))
        with _in_time(), pytest.raises(LedgerUnavailable, match="lock timeout"):
            bounded.renew_lease("job", 1, 60)


def test_a_long_query_ends_on_the_server_before_its_client_gives_up(bounded: Ledger) -> None:
    with pytest.raises(LedgerUnavailable, match="statement timeout"), bounded.database.read() as session:
        session.execute(text("set local statement_timeout = 50"))
        session.execute(text("select pg_sleep(60)"))
    with bounded.database.read() as session:
        bounds = [session.scalar(text(f"show {name}")) for name in ("statement_timeout", "lock_timeout")]
    assert bounds == ["4s", "3s"]
    assert CALL_SECONDS > 4


def test_nothing_is_kept_in_a_session_of_the_server_from_one_transaction_to_the_next(url: str, ledger: Ledger) -> None:
    other = Ledger.lazy(url)
    with other.database.read() as session:
        for _ in range(10):
            session.execute(text("select 1"))
    with other.database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        bounds = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        assert {connection.exec_driver_sql(f"show {name}").scalar() for name in bounds} == {"0"}
        assert connection.exec_driver_sql("select count(*) from pg_prepared_statements").scalar() == 0
    other.close()


def test_bounds_in_the_url_are_those_that_hold_and_must_be_numbers(url: str, ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="connect_timeout"):
        Ledger.open(f"{url}?connect_timeout=soon")
    other = Ledger.lazy(f"{url}?options=-c%20statement_timeout%3D12345&application_name=x&connect_timeout=60")
    with other.database.read() as session:
        shown = [session.scalar(text(f"show {name}")) for name in ("statement_timeout", "application_name")]
    assert shown == ["12345ms", "x"]
    other.close()


def test_a_database_file_that_is_locked_does_not_stop_readers_and_one_that_is_none_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    writer = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    assert ledger.live() is None  # one that waits ends in an error
    writer.close()
    ledger.close()
    (tmp_path / "folder").mkdir()
    with pytest.raises(LedgerUnavailable, match="unable to open"):
        Ledger.open(f"sqlite:///{tmp_path / 'folder'}")
