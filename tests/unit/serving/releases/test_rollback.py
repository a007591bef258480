from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from core.errors import LedgerUnavailable, ReleaseConflict, ReleaseError
from core.ledger import Family, Ledger
from ops.cli.main import app
from serving.releases import rollback
from serving.releases.rollback import roll_back_offline
from serving.releases.types import ReleaseResult, ReleaseSnapshot, RollbackCommand
from tests.support.waiting import until
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, Server

ANSWER_SECONDS = rollback.ANSWER_SECONDS
"""The value outside of tests."""


@pytest.fixture
async def server(ledger: Ledger) -> Server:
    """Release 2 has adapter a, and release 1 the base."""
    made = Server(ledger, hold_after_rollback=True)
    await made.start()
    await made.create(clip="a")
    return made


def preparing(server: Server, **adapters: str) -> asyncio.Task[ReleaseResult]:
    return asyncio.create_task(server.create(**adapters))  # type: ignore[arg-type]


async def covering_update(server: Server) -> tuple[int, asyncio.Task[ReleaseResult | None]]:
    """An update to b whose catalog is not complete."""
    server.broadcast.stuck = "i-b"
    update, stepping = server.propose(name="b"), asyncio.create_task(server.step())
    await until(lambda: ("i-b", True) in server.broadcast.covered)
    return update, stepping


async def test_it_takes_the_newest_other_adapter_and_what_is_not_resident_any_more_is_prepared_first(
    server: Server,
) -> None:
    await server.create(clip="b")
    made = await server.back()
    assert (made.number, made.clip, made.kind) == (4, "a", "rollback")
    assert server.broadcast.covered[-1] == ("i-b", True), "nothing was asked of the catalog"
    assert server.broadcast.windows[-1] == [4, 3]
    assert (await server.back(to=1)).clip is None
    assert server.broadcast.covered[-1] == ("i-None", True)


async def test_of_one_family_it_keeps_the_other(server: Server) -> None:
    await server.create(vlm="v")
    await server.create(clip="b", vlm="w")
    turns: list[tuple[Family | None, int | None, tuple[str | None, str | None]]] = [
        ("vlm", None, ("b", "v")), ("clip", None, ("a", "v")), ("vlm", 1, ("a", None)), (None, None, ("a", "v")),
        (None, 1, (None, None)),
    ]  # fmt: skip
    for family, to, after in turns:
        await server.back(family, to)
        assert server.live[1:] == after


async def test_with_nothing_behind_it_says_so(server: Server) -> None:
    with pytest.raises(ReleaseError, match="no release before 2 has another VLM adapter"):
        await server.back("vlm")
    with pytest.raises(ReleaseError, match="release 9 does not exist"):
        await server.back(to=9)
    await server.back(to=1)
    assert server.live[0] == 3


@pytest.mark.parametrize("call", ["prepare", "cover", "in_flight", "retire_spaces", "retire", "announce"])
async def test_a_replica_that_never_answers_does_not_hold_it_up(server: Server, call: str) -> None:
    server.broadcast.never = {call}
    outcome = await server.back()
    assert (outcome.number, outcome.clip) == (3, None)


@pytest.mark.parametrize("call", ["prepare", "cover"])
async def test_a_preparation_that_never_ends_is_stopped_and_its_proposal_says_why(server: Server, call: str) -> None:
    server.broadcast.never, server.broadcast.asked = {call}, []
    slow = preparing(server, clip="b")
    await until(lambda: call in server.broadcast.asked)
    assert (await server.back()).number == 3
    with pytest.raises(ReleaseConflict, match="ann rolled back while it was being prepared"):
        await slow
    failed = server.ledger.proposals(2)[1]
    assert (failed.state, failed.clip) == ("failed", "b") and "ann rolled back" in (failed.error or "")
    server.broadcast.never = set()
    assert (await server.create(clip="c")).number == 4


async def test_an_update_judged_against_what_is_taken_back_fails(server: Server) -> None:
    update, stepping = await covering_update(server)
    await server.back("clip")
    with pytest.raises(ReleaseConflict, match="ann rolled back"):
        await stepping
    assert server.ledger.proposal(update).state == "failed"


async def test_an_update_waits_while_the_other_family_is_rolled_back_and_until_somebody_resumes(server: Server) -> None:
    await server.create(vlm="v")
    update, stepping = await covering_update(server)
    await server.back("vlm")
    assert await stepping is None
    assert server.live == (4, "a", None)
    server.broadcast.stuck = ""
    assert await server.step() is None, "a rollback holds updates"
    assert server.ledger.proposal(update).state == "pending"
    server.ledger.resume("ann", "fine")
    await server.step()
    assert server.live == (5, "b", None)


async def test_a_proposal_that_has_only_just_got_its_turn_is_stopped(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposed = asyncio.Event()
    advance = server.ledger.advance_proposal

    def slowly(*args: object, **options: object) -> object:
        loop.call_soon_threadsafe(proposed.set)
        time.sleep(0.3)
        return advance(*args, **options)  # type: ignore[arg-type]

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(server.ledger, "advance_proposal", slowly)
    slow = preparing(server, clip="b")
    await proposed.wait()
    assert (await server.back()).number == 3
    with pytest.raises(ReleaseConflict, match="ann rolled back"):
        await slow


async def test_a_preparation_that_was_stopped_after_its_end_is_not_committed(server: Server) -> None:
    server.broadcast.gate = asyncio.Event()
    slow = preparing(server, vlm="v")
    await until(lambda: "v" in server.broadcast.prepared_vlm)
    async with server._committing:
        server.broadcast.gate.set()
        rolled = asyncio.create_task(server.back())
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(rolled, slow, return_exceptions=True)
    ends = {type(outcome) for outcome in outcomes}
    assert ends == {ReleaseResult, ReleaseConflict}  # one of both, whichever comes first
    assert server.live[0] == 3


async def test_a_retirement_that_never_ends_holds_up_neither_a_rollback_nor_a_release(server: Server) -> None:
    server.broadcast.never = {"retire_spaces"}
    retiring = asyncio.create_task(server.retire())
    await until(lambda: "retire_spaces" in server.broadcast.asked)
    assert (await server.back()).number == 3
    assert (await asyncio.wait_for(server.create(clip="c"), 5)).number == 4
    retiring.cancel()


async def test_what_no_replica_acknowledges_stands_and_they_are_told_again(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.releases.protocol.HEAL_PAUSE_SECONDS", 0.01)
    server.broadcast.deaf = True
    assert (await server.create(clip="b")).acknowledged == 0
    assert (await server.back()).acknowledged == 0
    assert server.live == (4, "a", None)
    server.broadcast.deaf = False
    await until(lambda: server.broadcast.windows[-1] == [4, 3])


async def test_a_process_that_has_just_begun_rolls_back_before_its_replicas_have_started(server: Server) -> None:
    again = Server(server.ledger, PlainBroadcast(never={"prepare", "prepare_vlm", "cover"}))
    again.broadcast.answering = [ReleaseSnapshot(2, "a", "i-a", "t-a"), ReleaseSnapshot(1, None, "i-None", "t-None")]
    starting = asyncio.create_task(again.start())
    assert (await again.back()).number == 3
    assert again.broadcast.windows[-1] == [3, 2]
    starting.cancel()


async def test_what_no_replica_can_serve_is_prepared_though_it_is_in_the_window(server: Server) -> None:
    again = Server(server.ledger, PlainBroadcast(broken={"": "its files are damaged"}))
    await again.start()
    with pytest.raises(ReleaseError, match="its files are damaged"):
        await again.back()
    assert again.live[0] == 2


async def test_after_the_guard_has_withdrawn_an_adapter_the_next_one_behind_is_resident(server: Server) -> None:
    await server.create(clip="b")
    server.ledger.withdraw(["b"], actor="guard", subject="release 3", reason="disagrees", evidence={})
    assert (await server.back()).clip == "a"
    await server.follow()
    server.broadcast.never = {"prepare", "cover"}
    assert (await server.back()).clip is None


async def test_an_update_that_is_being_prepared_when_a_hold_comes_waits_and_goes_on_after_it(server: Server) -> None:
    update = server.propose(name="b")
    server.broadcast.gate = asyncio.Event()
    stepping = asyncio.create_task(server.step())
    await until(lambda: "b" in server.broadcast.prepared)
    server.ledger.hold("ann", "incident")
    server.broadcast.gate.set()
    assert await stepping is None
    assert (server.live[0], server.ledger.proposal(update).state) == (2, "pending")
    server.ledger.resume("ann", "over")
    outcome = await server.step()
    assert outcome is not None and outcome.proposal == update


async def test_a_release_whose_operator_was_told_that_the_ledger_is_away_is_not_carried_out_later(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **options: object) -> None:
        raise LedgerUnavailable("the ledger is away.", "Wait.")

    with monkeypatch.context() as patch:
        patch.setattr(server.ledger, "commit_release", away)
        patch.setattr(server.ledger, "advance_proposal", away)
        with pytest.raises(LedgerUnavailable):
            await server.create(clip="b")
        with pytest.raises(LedgerUnavailable):
            await server.back()
    assert [row.state for row in server.ledger.pending_proposals()] == ["pending", "pending"]
    assert await server.step() is None
    assert server.ledger.pending_proposals() == [] and server.live[0] == 2


async def test_a_ledger_that_hangs_refuses_within_a_second(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    hung = threading.Event()
    monkeypatch.setattr(rollback, "ANSWER_SECONDS", ANSWER_SECONDS)
    monkeypatch.setattr(server.ledger, "live", lambda: hung.wait(30))
    try:
        with pytest.raises(LedgerUnavailable, match="did not say within"):
            await server.rollback(RollbackCommand(actor="ann", reason="bad", expected_live=2))
    finally:
        hung.set()


@pytest.fixture
def offline(ledger: Ledger) -> Callable[..., tuple[int, str | None, str | None]]:
    """A rollback without a server; release 3 has b and w, release 2 a and v, release 1 the bases."""
    for number, (clip, vlm) in enumerate([(None, None), ("a", "v"), ("b", "w")], 1):
        ledger.commit_release(number, clip=clip, vlm=vlm, actor="t", reason="r", proposal_id=None)

    def roll_back(*families: Family, to: int | None = None, **options: Any) -> tuple[int, str | None, str | None]:
        row = roll_back_offline(ledger, families, to=to, actor="ann", reason="nothing starts", **options)
        assert (row.actor, row.reason) == ("ann", "nothing starts")
        return row.number, row.clip, row.vlm

    return roll_back


def test_offline_it_is_a_new_release_with_its_proposal_its_audit_row_and_its_hold(
    ledger: Ledger, offline: Callable[..., object]
) -> None:
    assert offline("clip", "vlm", hold_after_rollback=True) == (4, "a", "v")
    (proposal,) = ledger.proposals()
    assert (proposal.kind, proposal.state, proposal.release) == ("rollback", "committed", 4)
    assert "rolled back offline" in {entry.action for entry in ledger.audit_rows(subject="release 4")}
    held = ledger.held()
    assert held is not None and "after the rollback of release 3" in held.reason
    assert offline("vlm", to=1) == (5, "a", None), "a family that is not named stays what is live"


def test_offline_a_release_that_does_not_exist_or_another_live_one_is_refused(
    ledger: Ledger, offline: Callable[..., object]
) -> None:
    with pytest.raises(ReleaseError, match="release 9 does not exist"):
        offline("clip", to=9)
    with pytest.raises(ReleaseConflict, match="release 3 is live, not 2"):
        offline("clip", to=1, expected_live=2)
    assert ledger.proposals() == []


def test_the_offline_command_needs_no_server(ledger: Ledger, tmp_path: Path, offline: object) -> None:
    words = ["--set", f"home={tmp_path}", "releases", "rollback", "--offline", "--to", "1", "-r", "no server starts"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "release 4 is in the ledger" in result.output
    row = ledger.live()
    assert row is not None and (row.number, row.clip) == (4, None)
    assert ledger.held() is not None  # rollout.hold_after_rollback
