from __future__ import annotations

from collections.abc import Callable

import pytest

from core.errors import Held, LeaseLost, LedgerError, ReleaseConflict
from core.ledger import Ledger, ReleaseRow
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


def test_releases_are_numbered_without_gaps_and_the_highest_is_live(ledger: Ledger) -> None:
    assert ledger.live() is None
    assert errors(race(*[lambda: release(ledger, number=1)] * 6)) == ["ReleaseConflict"] * 5, "of a race one wins"
    assert release(ledger, "clip-a") == ledger.live()
    for wrong in (2, 1, 4):
        with pytest.raises(ReleaseConflict):
            release(ledger, number=wrong)
    assert [(row.number, row.clip) for row in ledger.releases()] == [(2, "clip-a"), (1, None)]


def test_the_release_to_go_back_to_has_another_adapter_that_was_stable_and_not_withdrawn(ledger: Ledger) -> None:
    assert ledger.stable() is None
    for name in ("a", "b", "c"):
        ledger.register_adapter(name, "clip", "base", f"i-{name}", "t", {})
    for clip, vlm, share in ((None, None, 1.0), ("a", "v", 1.0), ("b", "v", 0.0), ("c", "v", 0.1), ("c", "w", 1.0)):
        release(ledger, clip, vlm, share)
    release(ledger, "a", share=0.5)
    stable = [row.number if row else None for row in (ledger.stable(), *map(ledger.incumbent, (6, 5, 2, 1)))]
    assert stable == [5, 5, 2, 1, None]
    found = [ledger.before(*each) for each in (("clip", "c"), ("clip", None), ("vlm", "w"), ("vlm", None))]  # type: ignore[arg-type]
    assert [row.number if row else None for row in found] == [2, 5, 2, 5]
    assert [ledger.was_stable("clip", name) for name in (None, "a", "b", "c")] == [True, True, False, True]
    assert ledger.was_stable("vlm", None)
    ledger.withdraw(["a"], actor="guard", subject="release 2", reason="disagrees", evidence={})
    assert ledger.before("clip", "c").number == 1  # type: ignore[union-attr]
    assert ledger.before("vlm", "w").number == 2  # type: ignore[union-attr]


def test_a_share_is_between_0_and_1_and_what_is_forced_or_a_canary_is_in_the_audit(ledger: Ledger) -> None:
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(LedgerError, match="not between 0 and 1"):
            ledger.propose("release", clip="a", actor="a", reason="r", share=wrong)
    release(ledger)
    proposal = ledger.propose("release", clip="a", actor="ann", reason="sure", share=0.2, forced=True)
    assert (proposal.share, proposal.forced) == (0.2, True)
    release(ledger, "a", share=0.2, proposal=proposal.id)
    released, proposed, first = ledger.audit_rows(3)
    assert {(row.detail["share"], row.detail["forced"]) for row in (released, proposed)} == {(0.2, True)}
    assert {"share", "forced"} & set(first.detail) == set()
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


def test_a_controller_that_slept_writes_nothing_and_the_one_that_took_over_does(ledger: Ledger) -> None:
    old, new = ledger.acquire_lease(CONTROLLER_LEASE, "a", 0), ledger.acquire_lease(CONTROLLER_LEASE, "b", 60)
    proposal = _propose(ledger)
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


def test_two_controllers_do_not_release_one_proposal_twice_and_committed_stays_committed(ledger: Ledger) -> None:
    proposal = _propose(ledger)
    with pytest.raises(LedgerError, match="committed with its release"):
        ledger.advance_proposal(proposal.id, "committed")
    assert errors(race(*[lambda: _commit(ledger, proposal)] * 4)) == ["ReleaseConflict"] * 3
    with pytest.raises(ReleaseConflict, match="is committed as release 1"):
        _commit(ledger, proposal, number=2)
    assert len(ledger.releases()) == 1
    states: list[ProposalState] = ["pending", "preparing", "failed"]
    for state in states:
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


def test_a_hold_leaves_who_and_why_and_an_update_that_was_prepared_before_it_waits(ledger: Ledger) -> None:
    assert ledger.held() is None
    update, by_hand = _propose(ledger, "update", "updater"), _propose(ledger)
    ledger.advance_proposal(update.id, "preparing")
    ledger.hold("bob", "incident")
    ledger.hold("ann", "another")
    held = ledger.held()
    assert held is not None and held.actor == "bob"
    with pytest.raises(Held, match=r"bob holds updates \(incident\)"):
        _commit(ledger, update)
    assert ledger.proposal(update.id).state == "preparing"
    _commit(ledger, by_hand)
    ledger.resume("bob", "over")
    assert ledger.held() is None
    with pytest.raises(LedgerError, match="not on hold"):
        ledger.resume("ann", "again")
    _commit(ledger, update, number=2)
    assert [row.action for row in ledger.audit_rows()][:4] == ["release", "resume", "release", "hold"]


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
        held, live = ledger.held(), ledger.live()
        assert held is not None and raised in ([], ["Held"])
        if not raised:
            assert live is not None and live.created_at <= held.created_at
        ledger.resume("bob", "over")


def test_an_operators_rollback_holds_updates_and_promotions_and_the_guards_holds_nothing(ledger: Ledger) -> None:
    _commit(ledger, _propose(ledger, "rollback", "guard"))
    assert ledger.held() is None
    _commit(ledger, _propose(ledger, "rollback", "ann"), number=2)
    held = ledger.held()
    assert held is not None and held.actor == "ann" and "rollback of release 1: bad colours" in held.reason
    assert [row.action for row in ledger.audit_rows(2)] == ["hold", "release"]
    for kind, actor in (("update", "updater"), ("promotion", "guard")):
        with pytest.raises(Held):
            _commit(ledger, _propose(ledger, kind, actor), number=3)  # type: ignore[arg-type]
    _commit(ledger, _propose(ledger, "promotion", "ann"), number=3)
    _commit(ledger, _propose(ledger, "rollback", "bob"), number=4)
    assert ledger.held() == held


def test_an_adapter_needs_force_until_it_passed_the_gate_or_was_live(ledger: Ledger) -> None:
    for name in ("passed", "served", "tried", "rejected"):
        ledger.register_adapter(name, "clip", "base", f"i-{name}", "t", {})
        begin(ledger, name)
    ledger.record_verdict("passed", "passed", "passed", "r", {})
    ledger.record_verdict("rejected", "rejected", "rejected", "r", {})
    again = ledger.record_verdict("rejected", "rejected", "passed", "r", {})
    assert again.outcome == "rejected", "a verdict falls once"
    release(ledger, "served")
    release(ledger, "tried", share=0.1)
    assert [ledger.unproven(name) for name in ("passed", "served")] == ["", ""]
    for name in ("tried", "rejected"):
        assert ledger.unproven(name) == f"{name} has no passed verdict in the ledger and was never live"
    ledger.withdraw(["passed", None], actor="guard", subject="release 3", reason="disagrees", evidence={"of": 40})
    ledger.withdraw(["passed"], actor="guard", subject="release 4", reason="again", evidence={})
    assert ledger.unproven("passed") == "passed was withdrawn: disagrees"
    assert ledger.withdrawn(["passed", "served", None]) == {"passed": "disagrees"}
    assert ledger.audit_rows(2)[1].detail == {"reason": "disagrees", "adapters": ["passed"], "of": 40}


def test_a_killed_updater_finds_its_update_again(ledger: Ledger) -> None:
    assert ledger.unfinished_update("clip") is None and not ledger.is_finished("u1")
    begin(ledger)
    begin(ledger)  # a restart begins the same update again
    assert len(ledger.updates()) == 1
    ledger.advance_update("u1", "trained", adapter="clip-a", cost={"steps": 5})
    found = ledger.unfinished_update("clip")
    assert found is not None
    assert (found.state, found.adapter, found.cost) == ("trained", "clip-a", {"steps": 5})
    assert not ledger.is_finished("u1")
    ledger.advance_update("u1", "done", cost={"gate": 1})
    assert ledger.unfinished_update("clip") is None and ledger.is_finished("u1")
    assert ledger.update("u1").cost == {"steps": 5, "gate": 1}
    with pytest.raises(LedgerError, match="u2"):
        ledger.advance_update("u2", "done")


def test_looks_count_verdicts_since_the_last_released_update(ledger: Ledger) -> None:
    def looked_at() -> list[str]:
        return [verdict.update_id for verdict in ledger.looks_since_release("clip")]

    for number in (1, 2):
        begin(ledger, f"u{number}")
        ledger.record_verdict(f"u{number}", f"clip-{number}", "rejected", "reports/x", {})
    assert looked_at() == ["u1", "u2"], "what says nothing of it has spent"
    assert ledger.looks_since_release("vlm") == []
    for number, spent in ((3, False), (4, True), (5, False)):
        begin(ledger, f"u{number}")
        ledger.record_verdict(f"u{number}", f"clip-{number}", "inconclusive", "reports/x", {"spent": spent})
    assert looked_at() == ["u1", "u2", "u4"]
    proposal = ledger.propose("update", clip="clip-5", vlm=None, actor="u", reason="r", update_id="u5")
    release(ledger, "clip-5", proposal=proposal.id)
    assert looked_at() == []


def test_an_adapter_name_is_never_reused_and_its_full_digest_is_recorded_once_and_stays(ledger: Ledger) -> None:
    def register(space: str = "i", digest: str | None = None) -> str | None:
        return ledger.register_adapter("clip-a", "clip", "base", space, "t", {"rank": 8}, digest=digest).digest

    assert register() is None and register() is None
    with pytest.raises(LedgerError, match="never reused"):
        register("i2")
    with pytest.raises(LedgerError, match="clip-b"):
        ledger.adapter("clip-b")
    assert ledger.adapter_digests(["clip-a", None, "clip-none"]) == {}
    first, second = "1" * 64, "2" * 64
    assert register(digest=first) == register() == first
    with pytest.raises(LedgerError, match="another digest"):
        register(digest=second)
    assert ledger.adapter_digests(["clip-a", None]) == {"clip-a": first}


OLD, NEW = "o" * 64, "n" * 64


def register_bases(ledger: Ledger) -> None:
    for name, base in (("a", OLD), ("n", NEW), ("m", NEW)):
        ledger.register_adapter(name, "clip", base, f"i-{name}", f"t-{name}", {})


def change(ledger: Ledger, clip: str | None, base: str = NEW, live: ReleaseRow | None = None) -> ReleaseRow:
    live = live or ledger.live()
    assert live is not None
    return ledger.change_base(live, clip=clip, base=base, live_base=OLD, rollback=False, actor="ann", reason="better")


def passed(ledger: Ledger, update_id: str, adapter: str) -> None:
    update = ledger.begin_base_upgrade(
        update_id, recipe={"name": "default.upgrade"}, seed=0, store_version=3, data_to={"t:0": 5}, incumbent="a",
        old=(OLD, "old"), new=(NEW, "new"), gflops=7.0, actor="ann",
    )  # fmt: skip
    assert (update.state, update.data_from) == ("training", {})
    ledger.advance_update(update_id, "trained", adapter=adapter)
    ledger.record_verdict(update_id, adapter, "passed", "report", {})
    ledger.advance_update(update_id, "done")


def test_releases_have_the_base_of_their_adapter_and_are_asked_for_by_it(ledger: Ledger) -> None:
    register_bases(ledger)
    bases = [release(ledger, clip, vlm).clip_base for clip, vlm in ((None, "v"), ("not recorded", "v"), ("a", "w"))]
    assert bases == [None, None, OLD]
    assert release(ledger, None, "w").clip_base == OLD, "the base alone: that of what was live"
    change(ledger, "n")
    release(ledger, "m", vlm="w")
    release(ledger, "n", share=0.1)
    assert [row.number for row in ledger.releases(9, NEW)] == [7, 6, 5]
    assert [row.number for row in ledger.releases(9, OLD)] == [4, 3, 2, 1], "what named no base is of the old one now"
    assert [row.number for row in ledger.releases(2)] == [7, 6]
    assert ledger.before("clip", "m", NEW) == ledger.release(5)
    assert ledger.before("clip", "n", NEW) == ledger.release(6)
    assert ledger.before("vlm", "w", NEW) is None and ledger.before("vlm", "w") == ledger.release(2)
    assert ledger.incumbent(5, NEW) is None and ledger.incumbent(5) == ledger.release(4)
    assert [row.number for row in ledger.newest_of_each_base()] == [6, 4]
    assert ledger.image_spaces_of_bases() == {"i-m"}


def test_a_change_of_base_keeps_the_vlm_and_waits_for_the_end_of_a_trial(ledger: Ledger) -> None:
    register_bases(ledger)
    first = release(ledger, "a", vlm="v")
    row = change(ledger, "n")
    assert (row.number, row.clip, row.vlm, row.clip_base, row.plain) == (2, "n", "v", NEW, True)
    (proposal,) = ledger.proposals()
    assert (proposal.state, proposal.release, proposal.kind) == ("committed", 2, "release")
    assert ledger.pending_proposals() == []
    assert "change base" in [each.action for each in ledger.audit_rows()]
    release(ledger, "a", share=0.1)
    with pytest.raises(ReleaseConflict, match="on trial"):
        change(ledger, "n")
    with pytest.raises(ReleaseConflict, match="cannot be next"):
        change(ledger, "n", live=first)
    assert [row.number for row in ledger.releases()] == [3, 2, 1] and len(ledger.proposals()) == 1


def test_an_upgrade_is_approved_until_it_is_released_dropped_or_withdrawn(ledger: Ledger) -> None:
    register_bases(ledger)
    release(ledger, "a")
    passed(ledger, "upgrade-1", "n")
    approved = ledger.approved_upgrade(NEW)
    assert approved is not None and (approved.old_name, approved.new_name, approved.gflops) == ("old", "new", 7.0)
    assert ledger.approved_upgrade(OLD) is None
    change(ledger, "n")
    assert ledger.approved_upgrade() is None
    passed(ledger, "upgrade-2", "m")
    assert ledger.approved_upgrade() is not None
    ledger.withdraw(["m"], actor="guard", subject="s", reason="r", evidence={})
    assert ledger.approved_upgrade() is None
