from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.errors import LedgerUnavailable, ReleaseConflict, ReleaseError
from core.ledger import Family, Ledger
from ops.cli.main import app
from serving.releases import rollback
from serving.releases.rollback import roll_back_offline
from serving.releases.types import ReleaseResult, ReleaseSnapshot, Residency, RollbackCommand
from tests.support.waiting import until
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, Server

ANSWER_SECONDS = rollback.ANSWER_SECONDS
"""The value outside of tests."""


@pytest.fixture
async def released(ledger: Ledger) -> Server:
    """Release 2 has adapter a, and release 1 the base; a rollback holds updates."""
    made = Server(ledger, hold_after_rollback=True)
    await made.start()
    await made.create(clip="a")
    return made


def preparing(server: Server, **adapters: str) -> asyncio.Task[ReleaseResult]:
    return asyncio.create_task(server.create(**adapters))  # type: ignore[arg-type]


async def covering(server: Server, **adapters: str) -> asyncio.Task[ReleaseResult]:
    """A release of b whose catalog is not complete until ``unstick`` is set."""
    server.broadcast.stuck = "i-b"
    slow = preparing(server, clip="b", **adapters)
    await until(lambda: ("i-b", True) in server.broadcast.covered)
    return slow


async def test_the_first_start_releases_the_bases_and_a_release_waits_for_the_catalog(server: Server) -> None:
    assert server.live == (1, None, None)
    assert [(row.kind, row.family) for row in server.ledger.proposals()] == [("initial", "both")]
    told = server.broadcast
    assert (told.prepared, told.prepared_vlm, told.covered) == ([None], [], []), "it waits for encoders only"
    made = await server.create(clip="a")
    assert (made.number, made.clip, made.acknowledged) == (2, "a", 3)
    assert told.covered[-1] == ("i-a", True)
    assert told.windows[-1] == [2, 1]
    again = Server(server.ledger)
    assert await again.start() is None
    assert again.broadcast.windows == [[2, 1]]
    assert again.broadcast.covered == [("i-a", False), ("i-None", False)]


@pytest.mark.parametrize("broken", ["a", "v"])
async def test_when_one_of_two_cannot_be_served_neither_goes_live(server: Server, broken: str) -> None:
    server.broadcast.broken[broken] = "its golden answers are not finite"
    with pytest.raises(ReleaseError, match=f"{broken} cannot be served: its golden answers"):
        await server.create(clip="a", vlm="v")
    failed = server.ledger.proposals(1)[0]
    assert failed.state == "failed" and "golden" in (failed.error or "")
    server.broadcast.spaces[(2, "b")] = "another"
    with pytest.raises(ReleaseError, match="replicas disagree"):
        await server.create(clip="b")
    assert server.live == (1, None, None) and server.broadcast.windows == [[1]]


@pytest.mark.parametrize("second", [{"clip": "b"}, {"vlm": "v"}])
async def test_of_two_releases_at_once_the_second_conflicts(server: Server, second: dict[str, str]) -> None:
    orders = server.create(expected=1, clip="a"), server.create(expected=1, **second)  # type: ignore[arg-type]
    results = await asyncio.gather(*orders, return_exceptions=True)
    assert [type(result) for result in results] == [ReleaseResult, ReleaseConflict]
    assert server.live == (2, "a", None)


async def test_what_is_being_prepared_is_not_retired(server: Server) -> None:
    slow = await covering(server, vlm="v")
    await server.retire()
    assert server.broadcast.kept == [[1, 2]]
    assert server.broadcast.loaded == [(None, "b", None, "v")]
    slow.cancel()


async def test_what_is_prepared_while_replicas_unload_others_is_announced(released: Server) -> None:
    released.broadcast.retire_gate = asyncio.Event()
    retiring = asyncio.create_task(released.retire())
    await until(lambda: released.broadcast.loaded)
    slow = await covering(released)
    released.broadcast.retire_gate.set()
    await retiring
    released.broadcast.unstick.set()
    assert (await slow).acknowledged == 3
    assert released.broadcast.windows[-1] == [3, 2]


@pytest.mark.parametrize("when", [2, 3])  # the first look counts requests in flight
async def test_a_commit_during_a_retirement_stays(server: Server, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    slow = await covering(server)
    residency, looks = server.preparation.residency, 0

    async def outdated() -> Residency:
        nonlocal looks
        looks += 1
        found = await residency()
        if looks == when:
            server.broadcast.unstick.set()
            await slow
        return found

    monkeypatch.setattr(server.preparation, "residency", outdated)
    await server.retire()
    assert looks == 3, "it looks again after the catalog has dropped what it may"
    assert server.broadcast.kept == [[1, 2]]
    assert [set(loaded) for loaded in server.broadcast.loaded] == [{None, "b"}]


async def test_a_release_is_retired_only_when_none_of_its_requests_is_in_flight(released: Server) -> None:
    await released.create(clip="b")
    released.broadcast.flight = {1: 1, 3: 5}
    await released.retire(patience_seconds=0.2)
    assert released.broadcast.kept == []
    released.broadcast.flight = {2: 1, 3: 5}
    await released.retire()
    assert released.broadcast.kept == [[3, 2]]


async def test_updates_wait_while_held_and_one_that_was_left_in_preparation_is_taken_up(server: Server) -> None:
    update = server.propose()
    server.ledger.hold("me", "looking")
    assert await server.step() is None
    assert (await server.create(clip="b")).number == 2, "an operator does not wait"
    server.ledger.resume("me", "fine")
    server.broadcast.gate = asyncio.Event()
    stepping = asyncio.create_task(server.step())
    await until(lambda: "a" in server.broadcast.prepared)
    server.ledger.hold("ann", "incident")
    server.broadcast.gate.set()
    assert await stepping is None
    assert (server.live[0], server.ledger.proposal(update).state) == (2, "pending")
    server.ledger.resume("ann", "over")
    server.ledger.advance_proposal(update, "preparing")  # by a controller that was killed
    again = Server(server.ledger)
    await again.start()
    taken = await again.step()
    assert taken is not None and (taken.clip, taken.kind, taken.proposal) == ("a", "update", update)
    assert server.ledger.proposal(update).state == "committed"


async def test_updates_of_a_vlm_that_starts_let_those_of_clip_pass(server: Server) -> None:
    server.propose("vlm", "v", "v")
    server.propose("clip", "a", "a")
    server.broadcast.vlm_up = False
    assert await server.step() is not None and await server.step() is None
    assert server.live == (2, "a", None)
    server.broadcast.vlm_up = True
    assert await server.step() is not None
    assert server.live == (3, "a", "v")


async def test_a_release_of_one_family_keeps_the_other_as_it_is_live(released: Server) -> None:
    told = released.broadcast
    covered = list(told.covered)
    made = await released.create(vlm="v")
    assert (made.clip, made.vlm, made.family) == ("a", "v", "vlm")
    assert (told.prepared, told.prepared_vlm) == ([None, "a"], ["v"])
    assert told.covered == covered, "the catalog has nothing to do with a VLM"
    released.propose("clip", "b", "stale")
    await released.step()
    assert released.live == (4, "b", "v")
    released.propose("vlm", "w", "stale")
    await released.create(clip="c")
    await released.step()
    assert released.live == (6, "c", "w")


async def test_what_a_rollback_of_clip_goes_back_to_stays_indexed_behind_vlm_releases(released: Server) -> None:
    for name in ("v", "w", "x"):
        await released.create(vlm=name)
    assert (released.broadcast.windows[-1], released.broadcast.indexed[-1]) == ([5, 4], [5, 4, 1])
    await released.back("clip")
    assert released.live == (6, None, "x")
    assert released.broadcast.covered[-1] == ("i-a", True), "its index is complete: the catalog is not asked"


async def test_vlm_replicas_keep_what_a_rollback_goes_back_to_and_never_more_than_the_window(server: Server) -> None:
    for adapters in ({"vlm": "v"}, {"vlm": "w"}, {"clip": "a"}, {"clip": "b"}):
        await server.create(**adapters)  # type: ignore[arg-type]
    assert server.broadcast.vlms[-1] == ("w", "v")
    await server.create(vlm="x")
    assert server.broadcast.vlms[-1] == ("x", "w")


async def test_without_vlm_replicas_only_clip_is_released(ledger: Ledger) -> None:
    server = Server(ledger, PlainBroadcast(has_vlm=False))
    await server.start()
    await server.create(clip="a")
    with pytest.raises(ReleaseError, match="no vision-language model is served"):
        await server.create(vlm="v")
    await server.back()
    assert server.live == (3, None, None) and server.broadcast.prepared_vlm == []


async def test_a_rollback_takes_the_newest_other_adapter_and_prepares_what_is_not_resident(released: Server) -> None:
    with pytest.raises(ReleaseError, match="no release before 2 has another VLM adapter"):
        await released.back("vlm")
    with pytest.raises(ReleaseError, match="release 9 does not exist"):
        await released.back(to=9)
    await released.create(clip="b")
    made = await released.back()
    assert (made.number, made.clip, made.kind) == (4, "a", "rollback")
    assert released.broadcast.covered[-1] == ("i-b", True), "nothing was asked of the catalog"
    assert released.broadcast.windows[-1] == [4, 3]
    assert (await released.back(to=1)).clip is None
    assert released.broadcast.covered[-1] == ("i-None", True)


async def test_a_rollback_of_one_family_keeps_the_other(released: Server) -> None:
    await released.create(vlm="v")
    await released.create(clip="b", vlm="w")
    turns: list[tuple[Family | None, int | None, tuple[str | None, str | None]]] = [
        ("vlm", None, ("b", "v")), ("clip", None, ("a", "v")), ("vlm", 1, ("a", None)), (None, None, ("a", "v")),
        (None, 1, (None, None)),
    ]  # fmt: skip
    for family, to, after in turns:
        await released.back(family, to)
        assert released.live[1:] == after


@pytest.mark.parametrize("call", ["prepare", "cover", "announce", "in_flight", "retire_spaces", "retire"])
async def test_a_replica_that_never_answers_holds_up_no_rollback(released: Server, call: str) -> None:
    released.broadcast.never, released.broadcast.asked = {call}, []
    retiring, retires = asyncio.create_task(released.retire()), call.startswith(("in_", "retire"))
    if retires:
        await until(lambda: call in released.broadcast.asked)
    outcome = await released.back()
    assert (outcome.number, outcome.clip) == (3, None)
    if retires:
        assert (await asyncio.wait_for(released.create(clip="c"), 5)).number == 4
    retiring.cancel()


@pytest.mark.parametrize("moment", ["its turn", "prepare", "cover"])
async def test_a_rollback_stops_a_preparation_at_any_moment_and_its_proposal_says_why(
    released: Server, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    advance = released.ledger.advance_proposal

    def slowly(*args: object, **options: object) -> object:
        released.broadcast.asked.append("its turn")
        time.sleep(0.3)
        return advance(*args, **options)  # type: ignore[arg-type]

    if moment == "its turn":
        monkeypatch.setattr(released.ledger, "advance_proposal", slowly)
    released.broadcast.never, released.broadcast.asked = {moment}, []
    slow = preparing(released, clip="b")
    await until(lambda: moment in released.broadcast.asked)
    assert (await released.back()).number == 3
    with pytest.raises(ReleaseConflict, match="ann rolled back while it was being prepared"):
        await slow
    failed = released.ledger.proposals(2)[1]
    assert (failed.state, failed.clip) == ("failed", "b") and "ann rolled back" in (failed.error or "")
    released.broadcast.never = set()
    assert (await released.create(clip="c")).number == 4


async def test_an_update_waits_while_the_other_family_is_rolled_back_and_fails_if_its_own_is(released: Server) -> None:
    async def covering() -> asyncio.Task[ReleaseResult | None]:
        told.covered.clear()
        stepping = asyncio.create_task(released.step())
        await until(lambda: ("i-b", True) in told.covered)
        return stepping

    await released.create(vlm="v")
    told, update = released.broadcast, released.propose(name="b")
    told.stuck = "i-b"
    stepping = await covering()
    await released.back("vlm")
    assert await stepping is None
    assert released.live == (4, "a", None)
    assert await released.step() is None, "a rollback holds updates"
    assert released.ledger.proposal(update).state == "pending"
    released.ledger.resume("ann", "fine")
    stepping = await covering()
    await released.back("clip")
    with pytest.raises(ReleaseConflict, match="ann rolled back"):
        await stepping
    assert released.ledger.proposal(update).state == "failed", "it was judged against what is taken back"


async def test_a_preparation_that_was_stopped_after_its_end_is_not_committed(released: Server) -> None:
    released.broadcast.gate = asyncio.Event()
    slow = preparing(released, vlm="v")
    await until(lambda: "v" in released.broadcast.prepared_vlm)
    async with released._committing:
        released.broadcast.gate.set()
        rolled = asyncio.create_task(released.back())
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(rolled, slow, return_exceptions=True)
    ends = {type(outcome) for outcome in outcomes}
    assert ends == {ReleaseResult, ReleaseConflict}  # one of both, whichever comes first
    assert released.live[0] == 3


async def test_what_nobody_acknowledges_stands_and_is_told_again(
    released: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.releases.protocol.HEAL_PAUSE_SECONDS", 0.01)
    released.broadcast.deaf = True
    assert (await released.create(clip="b")).acknowledged == 0
    assert (await released.back()).acknowledged == 0
    assert released.live == (4, "a", None)
    released.broadcast.deaf = False
    await until(lambda: released.broadcast.windows[-1] == [4, 3])


async def test_a_process_that_has_just_begun_rolls_back_before_its_replicas_have_started(released: Server) -> None:
    again = Server(released.ledger, PlainBroadcast(never={"prepare", "prepare_vlm", "cover"}))
    again.broadcast.answering = [ReleaseSnapshot(2, "a", "i-a", "t-a"), ReleaseSnapshot(1, None, "i-None", "t-None")]
    starting = asyncio.create_task(again.start())
    assert (await again.back()).number == 3
    assert again.broadcast.windows[-1] == [3, 2]
    starting.cancel()


async def test_what_no_replica_can_serve_is_prepared_though_it_is_in_the_window(released: Server) -> None:
    again = Server(released.ledger, PlainBroadcast(broken={"": "its files are damaged"}))
    await again.start()
    with pytest.raises(ReleaseError, match="its files are damaged"):
        await again.back()
    assert again.live[0] == 2


async def test_what_is_behind_a_withdrawn_adapter_is_resident_and_gone_back_to(released: Server) -> None:
    await released.create(clip="b")
    await released.create(clip="c")
    released.ledger.withdraw(["b"], actor="guard", subject="release 3", reason="disagrees", evidence={})
    await released.follow()
    released.broadcast.never = {"prepare", "cover"}
    assert (await released.back()).clip == "a"
    with pytest.raises(ReleaseError, match=r"b was withdrawn: disagrees .*--force"):
        await released.back(to=3)


async def test_a_release_that_an_outage_refused_stays_so(released: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*args: object, **options: object) -> None:
        raise LedgerUnavailable("the ledger is away.", "Wait.")

    with monkeypatch.context() as patch:
        patch.setattr(released.ledger, "commit_release", away)
        patch.setattr(released.ledger, "advance_proposal", away)
        with pytest.raises(LedgerUnavailable):
            await released.create(clip="b")
        with pytest.raises(LedgerUnavailable):
            await released.back()
    assert [row.state for row in released.ledger.pending_proposals()] == ["pending", "pending"]
    assert await released.step() is None
    assert released.ledger.pending_proposals() == [] and released.live[0] == 2


async def test_a_ledger_that_hangs_refuses_within_a_second(released: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()
    monkeypatch.setattr(rollback, "ANSWER_SECONDS", ANSWER_SECONDS)
    monkeypatch.setattr(released.ledger, "live", lambda: hung.wait(30))
    try:
        with pytest.raises(LedgerUnavailable, match="did not say within"):
            await released.rollback(RollbackCommand(actor="ann", reason="bad", expected_live=2))
    finally:
        hung.set()


def test_a_rollback_without_a_server_is_a_release_with_proposal_audit_and_hold(ledger: Ledger, tmp_path: Path) -> None:
    for number, (clip, vlm) in enumerate([(None, None), ("a", "v"), ("b", "w")], 1):
        ledger.commit_release(number, clip=clip, vlm=vlm, actor="t", reason="r", proposal_id=None)

    def offline(*families: Family, to: int | None = None, **options: Any) -> tuple[int, str | None, str | None]:
        row = roll_back_offline(ledger, families, to=to, actor="ann", reason="nothing starts", **options)
        assert (row.actor, row.reason) == ("ann", "nothing starts")
        return row.number, row.clip, row.vlm

    with pytest.raises(ReleaseError, match="release 9 does not exist"):
        offline("clip", to=9)
    with pytest.raises(ReleaseConflict, match="release 3 is live, not 2"):
        offline("clip", to=1, expected_live=2)
    assert ledger.proposals() == []
    assert offline("clip", "vlm") == (4, "a", "v")
    (proposal,) = ledger.proposals()
    assert (proposal.kind, proposal.state, proposal.release) == ("rollback", "committed", 4)
    assert "rolled back offline" in {entry.action for entry in ledger.audit_rows(subject="release 4")}
    assert offline("vlm", to=1) == (5, "a", None), "a family that is not named stays what is live"
    words = ["--set", f"home={tmp_path}", "releases", "rollback", "--offline", "--to", "3", "-r", "no server starts"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "release 6 is in the ledger" in result.output, result.output
    live, held = ledger.live(), ledger.held()
    assert live is not None and (live.number, live.clip) == (6, "b")
    assert held is not None and "after the rollback of release 5" in held.reason, "rollout.hold_after_rollback"
