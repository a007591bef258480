"""One controller at a time changes what is live, an end of a proposal is final, and a hold is kept by the commit."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from core.errors import Held, LeaseLost, LedgerError, ReleaseConflict
from core.ledger import Ledger
from core.ledger.leases import CONTROLLER_LEASE
from core.ledger.rows import ProposalKind, ProposalRow, ProposalState


def _propose(ledger: Ledger, kind: ProposalKind = "release", actor: str = "ann") -> ProposalRow:
    return ledger.propose(kind, clip="a", actor=actor, reason="bad colours")


def _commit(ledger: Ledger, proposal: ProposalRow, epoch: int | None = None, number: int = 1) -> None:
    ledger.commit_release(
        number, clip="a", vlm=None, actor=proposal.actor, reason=proposal.reason, proposal_id=proposal.id, epoch=epoch,
        hold_after_rollback=True,
    )  # fmt: skip


def _race(*calls: Callable[[], object]) -> list[str]:
    """What each call raised; empty for those that succeeded."""
    barrier, results = threading.Barrier(len(calls)), []

    def run(call: Callable[[], object]) -> None:
        barrier.wait()
        try:
            call()
            results.append("")
        except LedgerError as error:
            results.append(type(error).__name__)
        except ReleaseConflict:
            results.append("ReleaseConflict")
        except Held:
            results.append("Held")

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results)


@pytest.fixture
def epochs(ledger: Ledger) -> tuple[int, int]:
    """Of a controller whose lease ran out, and of the one that took over."""
    old, new = ledger.acquire_lease(CONTROLLER_LEASE, "a", 0), ledger.acquire_lease(CONTROLLER_LEASE, "b", 60)
    assert old is not None and new is not None
    return old, new


def test_a_controller_that_slept_writes_nothing_and_the_one_that_took_over_does(
    ledger: Ledger, epochs: tuple[int, int]
) -> None:
    proposal = _propose(ledger)
    old, new = epochs
    late: list[Callable[[], object]] = [
        lambda: ledger.propose("release", clip="a", actor="ann", reason="r", epoch=old),
        lambda: ledger.advance_proposal(proposal.id, "preparing", epoch=old),
        lambda: ledger.advance_proposal(proposal.id, "failed", "no", epoch=old),
        lambda: _commit(ledger, proposal, old),
    ]
    for write in late:
        with pytest.raises(LeaseLost):
            write()
    assert [row.state for row in ledger.proposals()] == ["pending"] and ledger.live() is None
    ledger.advance_proposal(proposal.id, "preparing", epoch=new, expected="pending")
    _commit(ledger, proposal, new)
    assert ledger.proposal(proposal.id).release == 1


def test_a_proposal_is_taken_up_by_one_of_two_controllers(ledger: Ledger) -> None:
    proposal = _propose(ledger)
    take = [lambda: ledger.advance_proposal(proposal.id, "preparing", expected="pending")] * 4
    assert _race(*take) == ["", *["ReleaseConflict"] * 3]


def test_two_controllers_do_not_release_one_proposal_twice(ledger: Ledger) -> None:
    proposal = _propose(ledger)
    assert _race(*[lambda: _commit(ledger, proposal)] * 4) == ["", *["ReleaseConflict"] * 3]
    with pytest.raises(ReleaseConflict, match="is committed as release 1"):
        _commit(ledger, proposal, number=2)
    assert len(ledger.releases()) == 1


@pytest.mark.parametrize("state", ["pending", "preparing", "failed"])
def test_committed_stays_committed(ledger: Ledger, state: ProposalState) -> None:
    proposal = _propose(ledger)
    _commit(ledger, proposal)
    with pytest.raises(ReleaseConflict, match="is committed as release 1"):
        ledger.advance_proposal(proposal.id, state, "no replica answers")
    assert (ledger.proposal(proposal.id).state, ledger.proposal(proposal.id).error) == ("committed", None)


def test_failed_stays_failed_with_its_first_reason(ledger: Ledger) -> None:
    proposal = _propose(ledger)
    for reason in ("damaged", "another"):
        ledger.advance_proposal(proposal.id, "failed", reason)
    with pytest.raises(ReleaseConflict, match=r"is failed \(damaged\)"):
        ledger.advance_proposal(proposal.id, "preparing")
    with pytest.raises(ReleaseConflict):
        _commit(ledger, proposal)
    assert ledger.proposal(proposal.id).error == "damaged" and ledger.live() is None
    assert [row.action for row in ledger.audit_rows()] == ["proposal failed", "propose release"]


def test_only_a_release_commits_a_proposal(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="committed with its release"):
        ledger.advance_proposal(_propose(ledger).id, "committed")


def test_one_update_proposes_once_however_many_ask(ledger: Ledger) -> None:
    ledger.begin_update(
        "u", family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    ask = [lambda: ledger.propose("update", clip="a", actor="updater", reason="r", update_id="u")] * 4
    assert _race(*ask) == [""] * 4
    assert len(ledger.proposals()) == 1


def test_a_commit_of_the_same_attempt_is_the_same_release(ledger: Ledger) -> None:
    rows = [
        ledger.commit_release(1, clip="a", vlm=None, actor="ann", reason="r", proposal_id=None, attempt="one")
        for _ in range(2)
    ]
    assert rows[0] == rows[1] and len(ledger.releases()) == 1


def test_an_update_that_was_prepared_before_a_hold_is_not_committed_after_it(ledger: Ledger) -> None:
    update, by_hand = _propose(ledger, "update", "updater"), _propose(ledger)
    ledger.advance_proposal(update.id, "preparing")
    ledger.hold("bob", "incident")
    with pytest.raises(Held, match=r"bob holds updates \(incident\)"):
        _commit(ledger, update)
    assert ledger.proposal(update.id).state == "preparing"
    _commit(ledger, by_hand)
    ledger.resume("bob", "over")
    _commit(ledger, update, number=2)


def test_what_the_guard_promotes_is_held_and_what_an_operator_promotes_is_not(ledger: Ledger) -> None:
    ledger.hold("bob", "incident")
    with pytest.raises(Held):
        _commit(ledger, _propose(ledger, "promotion", "guard"))
    _commit(ledger, _propose(ledger, "promotion", "ann"))


def test_a_hold_and_a_commit_that_race_come_one_after_the_other(ledger: Ledger) -> None:
    for number in range(1, 9):
        update = _propose(ledger, "update", "updater")
        expected = ledger.live()
        next_number = expected.number + 1 if expected else 1
        raised = _race(
            lambda row=update, to=next_number: _commit(ledger, row, number=to),  # type: ignore[misc]
            lambda to=number: ledger.hold("bob", f"hold {to}"),  # type: ignore[misc]
        )
        held = ledger.held()
        live = ledger.live()
        assert held is not None and raised in (["", ""], ["", "Held"])
        if raised == ["", ""]:
            assert live is not None and live.created_at <= held.created_at
        ledger.resume("bob", "over")


def test_after_an_operators_rollback_updates_wait_until_somebody_resumes(ledger: Ledger) -> None:
    _commit(ledger, _propose(ledger, "rollback", "ann"))
    held = ledger.held()
    assert held is not None and held.actor == "ann" and "rollback of release 0: bad colours" in held.reason
    assert [row.action for row in ledger.audit_rows(2)] == ["hold", "release"]
    with pytest.raises(Held):
        _commit(ledger, _propose(ledger, "update", "updater"), number=2)
    _commit(ledger, _propose(ledger, "rollback", "bob"), number=2)
    assert ledger.held() == held


def test_the_guards_rollback_holds_nothing(ledger: Ledger) -> None:
    _commit(ledger, _propose(ledger, "rollback", "guard"))
    assert ledger.held() is None
