"""A database that is down, silent or busy makes a call fail within its limit, with one error. Where the answer to a
COMMIT is lost, the ledger finds out what was written, and writes nothing twice.
"""

from __future__ import annotations

import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from core.errors import CommitUnknown, LedgerError, LedgerUnavailable
from core.ledger import Ledger
from core.ledger.database import LOOKUP_SECONDS
from core.ledger.time_limits import CALL_SECONDS, time_limit
from tests.support.commit_relay import CommitRelay, Loss
from tests.support.kafka import wait_for
from tests.support.ledger_limits import patient, production_limits
from tests.support.postgres import PostgresServer

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


@pytest.fixture
def relay(server: PostgresServer) -> Iterator[CommitRelay]:
    made = CommitRelay(server.port)
    yield made
    made.close()


@pytest.fixture
def far(relay: CommitRelay, server: PostgresServer, ledger: Ledger, url: str) -> Iterator[Ledger]:
    opened = Ledger.lazy(patient(url.replace(str(server.port), str(relay.port))))
    yield opened
    opened.close()


def _commit(ledger: Ledger, proposal_id: int | None = None) -> int:
    row = ledger.commit_release(1, clip="a", vlm=None, actor="ann", reason="r", proposal_id=proposal_id)
    return row.number


def _somebody_waits(ledger: Ledger) -> Callable[[], None]:
    def wait() -> None:
        waiting = 0
        while not waiting:
            with ledger.database.read() as session:
                waiting = session.scalar(text("select count(*) from pg_locks where not granted")) or 0

    return wait


def _is_back(ledger: Ledger) -> bool:
    try:
        ledger.live()
    except LedgerUnavailable:
        return False
    return True


@pytest.mark.parametrize("loss", ["request", "answer", "connection"])
def test_a_release_whose_commit_is_lost_is_made_once(
    relay: CommitRelay, far: Ledger, ledger: Ledger, loss: Loss
) -> None:
    proposal = ledger.propose("release", clip="a", actor="ann", reason="r")
    relay.lose(loss, _somebody_waits(ledger) if loss == "connection" else lambda: None)
    assert _commit(far, proposal.id) == 1
    assert relay.lost == 1
    assert [row.proposal_id for row in ledger.releases()] == [proposal.id]
    assert ledger.proposal(proposal.id).state == "committed"
    assert [row.action for row in ledger.audit_rows()] == ["release", "propose release"]


@pytest.mark.parametrize("loss", ["request", "answer"])
def test_proposals_and_holds_whose_commit_is_lost_are_written_once_and_a_release_though_the_server_crashes(
    server: PostgresServer, relay: CommitRelay, far: Ledger, ledger: Ledger, loss: Loss
) -> None:
    relay.lose(loss)
    proposal = far.propose("release", clip="a", actor="ann", reason="r")
    relay.lose(loss)
    assert far.advance_proposal(proposal.id, "preparing").state == "preparing"
    relay.lose(loss)
    far.hold("ann", "incident")
    relay.lose(loss)
    far.resume("ann", "over")
    assert relay.lost == 4
    assert len(ledger.proposals()) == 1 and ledger.held() is None
    assert [row.action for row in ledger.audit_rows()] == ["resume", "hold", "propose release"]
    relay.lose(loss, server.restart)
    assert _commit(far) == 1
    assert [row.number for row in ledger.releases()] == [1]


def test_a_server_that_stays_silent_after_a_commit_leaves_it_unknown_until_it_is_back(
    server: PostgresServer, relay: CommitRelay, far: Ledger, ledger: Ledger
) -> None:
    with ExitStack() as silence:

        def fall_silent() -> None:
            silence.enter_context(server.suspended())
            silence.enter_context(production_limits())

        relay.lose("answer", fall_silent)
        began = time.monotonic()
        with pytest.raises(CommitUnknown, match="whether release 1 was written is unknown") as caught:
            _commit(far)
        assert time.monotonic() - began < LOOKUP_SECONDS + CALL_SECONDS + 10
    assert "Look it up" in caught.value.fix
    wait_for(lambda: _is_back(far), "the ledger")
    assert [row.number for row in far.releases()] == [1]


def test_a_ledger_that_is_away_before_the_commit_is_no_unknown_release(server: PostgresServer, ledger: Ledger) -> None:
    ledger.live()
    with server.suspended(), production_limits(), pytest.raises(LedgerUnavailable) as caught:
        _commit(ledger)
    assert not isinstance(caught.value, CommitUnknown)
    assert _commit(ledger) == 1
