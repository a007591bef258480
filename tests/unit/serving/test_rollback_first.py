"""A rollback to what is resident waits for nobody: replicas, catalog, preparations and retirements that never end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core.errors import LedgerUnavailable, ReleaseConflict, ReleaseError
from core.ledger import Ledger
from core.ledger.rows import Family
from serving.releases import rollback
from serving.releases.commands import ReleaseCommand, RollbackCommand
from serving.releases.protocol import ReleaseProtocol
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.types import Prepared, ReleaseResult, Residency
from tests.support.waiting import until
from tests.unit.serving.test_protocol import PlainBroadcast

ANSWER_SECONDS = rollback.ANSWER_SECONDS
"""As it is outside of tests."""
MOST_SECONDS = 5.0
"""Alone it takes 10 ms, and 0.3 s where replicas do not answer; the machine of a test may be busy."""


@dataclass
class StuckBroadcast(PlainBroadcast):
    """Calls that never return, by name."""

    never: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    async def prepare(self, clip: str | None) -> list[Prepared]:
        await self._pass("prepare")
        return await super().prepare(clip)

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        await self._pass("prepare_vlm")
        return await super().prepare_vlm(vlm)

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool) -> int:
        await self._pass("cover")
        return await super().cover(snapshot, wait)

    async def announce(self, resident: Residency, seconds: float) -> int:
        await self._pass("announce")
        return await super().announce(resident, seconds)

    async def in_flight(self) -> dict[int, int]:
        await self._pass("in_flight")
        return await super().in_flight()

    async def retire_spaces(self, keep: Sequence[ReleaseSnapshot], epoch: int | None) -> None:
        await self._pass("retire_spaces")

    async def retire(self, clips: Sequence[str | None], vlms: Sequence[str | None]) -> None:
        await self._pass("retire")

    async def _pass(self, name: str) -> None:
        self.asked.append(name)
        if name in self.never:
            await asyncio.Event().wait()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    ledger.register_adapter("b", family="clip", base="x", image_space="i-b", text_space="t-b", meta={})
    yield ledger
    ledger.close()


@pytest.fixture
def broadcast() -> StuckBroadcast:
    return StuckBroadcast()


@pytest.fixture
async def protocol(ledger: Ledger, broadcast: StuckBroadcast) -> AsyncIterator[ReleaseProtocol]:
    """Release 2 has adapter a, and release 1 the base."""
    protocol = ReleaseProtocol(ledger, broadcast, window=2, hold_after_rollback=True)
    await protocol.start()
    await protocol.release(ReleaseCommand(adapters={"clip": "a"}, actor="ann", reason="r", expected_live=1))
    yield protocol


async def back(protocol: ReleaseProtocol, family: Family | None = None) -> ReleaseResult:
    live = protocol.ledger.live()
    command = RollbackCommand(actor="ann", reason="bad", expected_live=live.number if live else 0, family=family)
    return await asyncio.wait_for(protocol.rollback(command), MOST_SECONDS)


def preparing(protocol: ReleaseProtocol, **adapters: str) -> asyncio.Task[ReleaseResult]:
    named: dict[Family, str | None] = {family: adapters[family] for family in ("clip", "vlm") if family in adapters}
    command = ReleaseCommand(adapters=named, actor="bob", reason="slow", expected_live=2)
    return asyncio.create_task(protocol.release(command))


@pytest.mark.parametrize("call", ["prepare", "cover", "in_flight", "retire_spaces", "retire", "announce"])
async def test_a_replica_that_never_answers_does_not_hold_it_up(
    protocol: ReleaseProtocol, broadcast: StuckBroadcast, call: str
) -> None:
    broadcast.never = {call}
    outcome = await back(protocol)
    assert (outcome.number, outcome.clip) == (3, None)


@pytest.mark.parametrize("call", ["prepare", "cover"])
async def test_a_preparation_that_never_ends_is_stopped_and_its_proposal_says_why(
    protocol: ReleaseProtocol, broadcast: StuckBroadcast, ledger: Ledger, call: str
) -> None:
    broadcast.never, broadcast.asked = {call}, []
    slow = preparing(protocol, clip="b")
    await until(lambda: call in broadcast.asked)
    assert (await back(protocol)).number == 3
    with pytest.raises(ReleaseConflict, match="ann rolled back while it was being prepared"):
        await slow
    failed = ledger.proposals(2)[1]
    assert (failed.state, failed.clip) == ("failed", "b") and "ann rolled back" in (failed.error or "")


async def test_a_proposal_that_has_only_just_got_its_turn_is_stopped(
    protocol: ReleaseProtocol, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    proposed = asyncio.Event()
    advance = ledger.advance_proposal

    def slowly(*args: object, **options: object) -> object:
        loop.call_soon_threadsafe(proposed.set)
        time.sleep(0.3)
        return advance(*args, **options)  # type: ignore[arg-type]

    loop = asyncio.get_running_loop()
    monkeypatch.setattr(ledger, "advance_proposal", slowly)
    slow = preparing(protocol, clip="b")
    await proposed.wait()
    assert (await back(protocol)).number == 3
    with pytest.raises(ReleaseConflict, match="ann rolled back"):
        await slow


async def test_a_preparation_that_was_stopped_after_its_end_is_not_committed(
    protocol: ReleaseProtocol, broadcast: StuckBroadcast, ledger: Ledger
) -> None:
    broadcast.gate = asyncio.Event()
    slow = preparing(protocol, vlm="v")
    await until(lambda: "v" in broadcast.prepared_vlm)
    async with protocol._runner.committing:
        broadcast.gate.set()
        rolled = asyncio.create_task(back(protocol))
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(rolled, slow, return_exceptions=True)
    ends = {type(outcome) for outcome in outcomes}
    assert ends == {ReleaseResult, ReleaseConflict}  # one of both, whoever comes first
    live = ledger.live()
    assert live is not None and live.number == 3


async def test_a_retirement_that_never_ends_holds_up_neither_a_rollback_nor_a_release(
    protocol: ReleaseProtocol, broadcast: StuckBroadcast
) -> None:
    broadcast.never = {"retire_spaces"}
    retiring = asyncio.create_task(protocol.retire())
    await until(lambda: "retire_spaces" in broadcast.asked)
    assert (await back(protocol)).number == 3
    command = ReleaseCommand(adapters={"clip": "c"}, actor="ann", reason="r", expected_live=3)
    assert (await asyncio.wait_for(protocol.release(command), MOST_SECONDS)).number == 4
    retiring.cancel()


async def test_replicas_that_did_not_answer_are_told_again(
    protocol: ReleaseProtocol, broadcast: StuckBroadcast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.releases.broadcast.HEAL_PAUSE_SECONDS", 0.01)
    broadcast.deaf = True
    assert (await back(protocol)).acknowledged == 0
    broadcast.deaf = False
    await until(lambda: broadcast.windows[-1] == [3, 2])


async def test_a_process_that_has_just_begun_rolls_back_before_its_replicas_have_started(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    stuck = StuckBroadcast(never={"prepare", "prepare_vlm", "cover"})
    stuck.answering = [ReleaseSnapshot(2, "a", "i-a", "t-a"), ReleaseSnapshot(1, None, "i-None", "t-None")]
    again = ReleaseProtocol(ledger, stuck, window=2)
    starting = asyncio.create_task(again.start())
    assert (await back(again)).number == 3
    assert stuck.windows[-1] == [3, 2]
    starting.cancel()


async def test_what_no_replica_can_serve_is_prepared_though_it_is_in_the_window(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    broken = StuckBroadcast(broken={"": "its files are damaged"})
    again = ReleaseProtocol(ledger, broken, window=2)
    await again.start()
    with pytest.raises(ReleaseError, match="its files are damaged"):
        await back(again)
    assert ledger.live().number == 2  # type: ignore[union-attr]


async def test_after_the_guard_has_withdrawn_an_adapter_the_next_one_behind_is_resident(
    protocol: ReleaseProtocol, broadcast: StuckBroadcast, ledger: Ledger
) -> None:
    await protocol.release(ReleaseCommand(adapters={"clip": "b"}, actor="ann", reason="r", expected_live=2))
    ledger.withdraw(["b"], actor="guard", subject="release 3", reason="disagrees", evidence={})
    assert (await back(protocol)).clip == "a"
    await protocol.follow()
    broadcast.never = {"prepare", "cover"}
    assert (await back(protocol)).clip is None


async def test_updates_wait_after_an_operators_rollback_until_somebody_resumes(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    await back(protocol)
    ledger.propose("update", clip="b", actor="updater", reason="passed")
    assert await protocol.step() is None
    ledger.resume("ann", "fine")
    outcome = await protocol.step()
    assert outcome is not None and outcome.clip == "b"


async def test_an_update_that_is_being_prepared_when_a_hold_comes_waits_and_goes_on_after_it(
    protocol: ReleaseProtocol, broadcast: StuckBroadcast, ledger: Ledger
) -> None:
    update = ledger.propose("update", clip="b", actor="updater", reason="passed")
    broadcast.gate = asyncio.Event()
    stepping = asyncio.create_task(protocol.step())
    await until(lambda: "b" in broadcast.prepared)
    ledger.hold("ann", "incident")
    broadcast.gate.set()
    assert await stepping is None
    assert (ledger.live().number, ledger.proposal(update.id).state) == (2, "pending")  # type: ignore[union-attr]
    ledger.resume("ann", "over")
    outcome = await protocol.step()
    assert outcome is not None and outcome.proposal == update.id


async def test_a_release_whose_operator_was_told_that_the_ledger_is_away_is_not_carried_out_later(
    protocol: ReleaseProtocol, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*args: object, **options: object) -> None:
        raise LedgerUnavailable("the ledger is away.", "Wait.")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "commit_release", away)
        patch.setattr(ledger, "advance_proposal", away)
        with pytest.raises(LedgerUnavailable):
            await preparing(protocol, clip="b")
        with pytest.raises(LedgerUnavailable):
            await back(protocol)
    assert [row.state for row in ledger.pending_proposals()] == ["pending", "pending"]
    assert await protocol.step() is None
    assert ledger.pending_proposals() == [] and ledger.live().number == 2  # type: ignore[union-attr]


async def test_a_ledger_that_hangs_refuses_within_a_second(
    protocol: ReleaseProtocol, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = threading.Event()
    monkeypatch.setattr(rollback, "ANSWER_SECONDS", ANSWER_SECONDS)
    monkeypatch.setattr(ledger, "live", lambda: hung.wait(30))
    command = RollbackCommand(actor="ann", reason="bad", expected_live=2)
    try:
        with pytest.raises(LedgerUnavailable, match="did not say within"):
            await protocol.rollback(command)
    finally:
        hung.set()
