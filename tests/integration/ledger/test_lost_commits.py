"""The answer to a COMMIT is lost: the ledger finds out what was written, and writes nothing twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import text

from core.errors import CommitUnknown, LedgerUnavailable
from core.ledger import Ledger
from core.ledger.database import LOOKUP_SECONDS
from core.ledger.time_limits import CALL_SECONDS
from tests.support.commit_relay import CommitRelay, Loss
from tests.support.kafka import wait_for
from tests.support.ledger_limits import patient, production_limits
from tests.support.postgres import PostgresServer

pytestmark = pytest.mark.integration


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
