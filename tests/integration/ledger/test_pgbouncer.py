"""The ledger behind a real PgBouncer in transaction pooling mode."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from core.addresses import free_port
from core.errors import LedgerUnavailable
from core.ledger import Ledger
from tests.support.downloads import installed
from tests.support.ledger_limits import production_limits
from tests.support.postgres import PostgresServer, other_user

BINARY = installed("pgbouncer")
pytestmark = pytest.mark.skipif(BINARY is None, reason="needs PgBouncer: apt-get install pgbouncer")


@pytest.fixture
def pooled(server: PostgresServer, url: str) -> Iterator[str]:
    """The URL of the empty database through PgBouncer, which shares two connections among all its clients."""
    assert BINARY
    folder, port = Path(tempfile.mkdtemp(prefix="ratchet-pgbouncer-")), free_port()
    settings = folder / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\nledger = host=127.0.0.1 port={server.port} user=ratchet\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\ndefault_pool_size = 2\n"
    )
    process = subprocess.Popen([*other_user(folder), BINARY, str(settings)], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        assert any("process up" in line for line in process.stderr)
        yield f"postgresql://ratchet@127.0.0.1:{port}/ledger"
    finally:
        process.terminate()
        process.communicate(timeout=20)
        shutil.rmtree(folder)


def test_a_ledger_behind_it_migrates_and_is_written_by_many_threads(pooled: str) -> None:
    ledger = Ledger.open(pooled)
    with ThreadPoolExecutor(8) as threads:  # psycopg prepares a statement that it has seen five times
        list(threads.map(lambda n: ledger.propose("release", clip=f"a{n}", actor="x", reason="r"), range(80)))
    assert len(ledger.proposals(limit=100)) == 80
    ledger.close()


def test_bounds_hold_in_each_transaction_and_leave_nothing_in_shared_connections(pooled: str, url: str) -> None:
    ledger = Ledger.open(pooled)
    with ledger.database.read() as session:
        names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
        assert [session.scalar(text(f"show {name}")) for name in names] == ["4s", "3s", "30s"]
    with production_limits(), pytest.raises(LedgerUnavailable, match="lock timeout"):
        ledger.acquire_lease("job", "a", 60)
        with ledger.database.engine.connect() as other:
            other.execute(text("select * from leases for update"))
            ledger.renew_lease("job", 1, 60)
    ledger.close()
    with psycopg.connect(pooled, client_encoding="utf8") as bare:
        found = bare.execute("show statement_timeout").fetchone()
    assert found == ("0",)


def test_a_database_that_is_silent_behind_it_fails_a_call_within_the_bound(server: PostgresServer, pooled: str) -> None:
    ledger = Ledger.open(pooled)
    began = time.monotonic()
    with server.suspended(), production_limits(), pytest.raises(LedgerUnavailable):
        ledger.live()
    assert time.monotonic() - began < 20
    ledger.close()
