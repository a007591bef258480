from __future__ import annotations

from collections.abc import Callable

import pytest

from core.errors import Held, LeaseLost, LedgerError, ReleaseConflict
from core.ledger import Ledger
from core.ledger.leases import CONTROLLER_LEASE
from core.ledger.rows import ProposalKind, ProposalRow, ProposalState
from tests.unit.core.ledger.steps import begin, errors, race, release


def _propose(ledger: Ledger, kind: ProposalKind = "release", actor: str = "ann") -> ProposalRow:
    return ledger.propose(kind, clip="a", actor=actor, reason="bad colours")


def _commit(ledger: Ledger, proposal: ProposalRow, epoch: int | None = None, number: int = 1) -> None:
    ledger.commit_release(
        number, clip="a", vlm=None, actor=proposal.actor, reason=proposal.reason, proposal_id=proposal.id, epoch=epoch,
        hold_after_rollback=True,
    )  # fmt: skip


def test_the_stable_release_is_the_newest_plain_one(ledger: Ledger) -> None:
    assert ledger.stable() is None
    for share in (1.0, 0.1, 1.0, 0.0, 0.5):
        release(ledger, "a", share=share)
    stable = ledger.stable()
    assert stable is not None
    assert (stable.number, ledger.live().number) == (3, 5)  # type: ignore[union-attr]
    before = [ledger.incumbent(number) for number in (5, 3, 2, 1)]
    assert [row.number if row else None for row in before] == [3, 1, 1, None]


def test_a_share_is_between_nothing_and_everything(ledger: Ledger) -> None:
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(LedgerError, match="not between 0 and 1"):
            ledger.propose("release", clip="a", actor="a", reason="r", share=wrong)


def test_what_was_forced_or_is_a_canary_is_in_the_audit(ledger: Ledger) -> None:
    release(ledger)
    proposal = ledger.propose("release", clip="a", actor="ann", reason="sure", share=0.2, forced=True)
    assert (proposal.share, proposal.forced) == (0.2, True)
    release(ledger, "a", share=0.2, proposal=proposal.id)
    released, proposed, first = ledger.audit_rows(3)
    assert {(row.detail["share"], row.detail["forced"]) for row in (released, proposed)} == {(0.2, True)}
    assert {"share", "forced"} & set(first.detail) == set()


def test_releases_are_numbered_without_gaps_and_the_highest_is_live(ledger: Ledger) -> None:
    assert ledger.live() is None
    release(ledger)
    assert release(ledger, "clip-a") == ledger.live()
    for wrong in (2, 1, 4):
        with pytest.raises(ReleaseConflict):
            release(ledger, number=wrong)
    assert [(row.number, row.clip) for row in ledger.releases()] == [(2, "clip-a"), (1, None)]


def test_of_writers_that_race_for_a_number_exactly_one_wins(ledger: Ledger) -> None:
    assert errors(race(*[lambda: release(ledger, "a", number=1)] * 6)) == ["ReleaseConflict"] * 5
    assert len(ledger.releases()) == 1


def test_the_release_to_go_back_to_has_another_adapter_that_answered_everybody_and_was_not_withdrawn(
    ledger: Ledger,
) -> None:
    for name in ("a", "b", "c"):
        ledger.register_adapter(name, "clip", "base", f"i-{name}", "t", {})
    for clip, vlm, share in ((None, None, 1.0), ("a", "v", 1.0), ("b", "v", 0.0), ("c", "v", 0.1), ("c", "w", 1.0)):
        release(ledger, clip, vlm, share)
    found = [ledger.before(*each) for each in (("clip", "c"), ("clip", None), ("vlm", "w"), ("vlm", None))]  # type: ignore[arg-type]
    assert [row.number if row else None for row in found] == [2, 5, 2, 5]
    assert [ledger.was_stable("clip", name) for name in (None, "a", "b", "c")] == [True, True, False, True]
    assert ledger.was_stable("vlm", None)
    ledger.withdraw(["a"], actor="guard", subject="release 2", reason="disagrees", evidence={})
    assert ledger.before("clip", "c").number == 1  # type: ignore[union-attr]
    assert ledger.before("vlm", "w").number == 2  # type: ignore[union-attr]


def test_an_operator_who_looked_too_early_is_told(ledger: Ledger) -> None:
    release(ledger)
    ledger.propose("rollback", clip=None, vlm=None, actor="a", reason="r", expected_live=1)
    release(ledger)
    with pytest.raises(ReleaseConflict, match="release 2 is live, not 1"):
        ledger.propose("rollback", clip=None, vlm=None, actor="b", reason="r", expected_live=1)


def test_an_update_proposes_once_however_many_ask_and_its_commit_marks_it(ledger: Ledger) -> None:
    begin(ledger)
    ask = [lambda: ledger.propose("update", clip="clip-a", actor="updater", reason="passed", update_id="u1")] * 4
    [found] = {row.id for row in race(*ask)}
    assert [p.id for p in ledger.pending_proposals()] == [found]
    release(ledger, "clip-a", proposal=found)
    assert ledger.pending_proposals() == []
    assert (ledger.proposal(found).state, ledger.proposal(found).release) == ("committed", 1)


def test_hold_and_resume_leave_who_and_why(ledger: Ledger) -> None:
    assert ledger.held() is None
    ledger.hold("ann", "incident")
    ledger.hold("bob", "another")
    held = ledger.held()
    assert held is not None and held.actor == "ann"
    ledger.resume("ann", "over")
    assert ledger.held() is None
    with pytest.raises(LedgerError, match="not on hold"):
        ledger.resume("ann", "again")
    assert [row.action for row in ledger.audit_rows()] == ["resume", "hold"]


@pytest.fixture
def epochs(ledger: Ledger) -> tuple[int, int]:
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
    ledger.advance_proposal(proposal.id, "preparing", epoch=new)
    _commit(ledger, proposal, new)
    assert ledger.proposal(proposal.id).release == 1


def test_two_controllers_do_not_release_one_proposal_twice(ledger: Ledger) -> None:
    proposal = _propose(ledger)
    assert errors(race(*[lambda: _commit(ledger, proposal)] * 4)) == ["ReleaseConflict"] * 3
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


def test_what_the_guard_promotes_is_held_and_its_rollback_holds_nothing(ledger: Ledger) -> None:
    """Unlike promotions and rollbacks by an operator."""
    _commit(ledger, _propose(ledger, "rollback", "guard"))
    assert ledger.held() is None
    ledger.hold("bob", "incident")
    with pytest.raises(Held):
        _commit(ledger, _propose(ledger, "promotion", "guard"), number=2)
    _commit(ledger, _propose(ledger, "promotion", "ann"), number=2)


def test_a_hold_and_a_commit_that_race_come_one_after_the_other(ledger: Ledger) -> None:
    for number in range(1, 9):
        update = _propose(ledger, "update", "updater")
        expected = ledger.live()
        next_number = expected.number + 1 if expected else 1
        raised = errors(
            race(
                lambda row=update, to=next_number: _commit(ledger, row, number=to),  # type: ignore[misc]
                lambda to=number: ledger.hold("bob", f"hold {to}"),  # type: ignore[misc]
            )
        )
        held = ledger.held()
        live = ledger.live()
        assert held is not None and raised in ([], ["Held"])
        if not raised:
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
