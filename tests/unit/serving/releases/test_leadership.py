from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from core.errors import LeaseLost, ReleaseConflict, ReleaseError
from core.ledger import Ledger
from core.settings import Settings
from serving.releases import controller as controllers
from serving.releases import leadership
from serving.releases.controller import ReleaseController
from serving.releases.leadership import ControllerLease
from serving.releases.types import ReleaseCommand, ReleaseResult
from tests.support.waiting import until
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, Server


@pytest.fixture
async def lease(ledger: Ledger) -> ControllerLease:
    made = ControllerLease(ledger)
    await made.keep()
    return made


@pytest.fixture
async def leading(ledger: Ledger, lease: ControllerLease) -> Server:
    made = Server(ledger, lease=lease)
    assert await made.start() is not None, "the first release"
    return made


@pytest.fixture
def beside(ledger: Ledger) -> Server:
    return Server(ledger, lease=ControllerLease(ledger))


async def ordered(server: Server, clip: str) -> asyncio.Task[ReleaseResult]:
    """A release that was ordered and is not yet executed."""
    task = asyncio.create_task(server.create(clip=clip))
    await until(server.ledger.pending_proposals)
    return task


async def test_a_controller_that_slept_past_its_lease_changes_nothing(ledger: Ledger) -> None:
    sleeper, second = ControllerLease(ledger, seconds=0.0), ControllerLease(ledger)
    assert await sleeper.keep()
    with pytest.raises(LeaseLost):  # the first release is made by one
        await Server(ledger, lease=second).start()
    server = Server(ledger, lease=sleeper)
    await server.start()
    update = server.propose()
    assert await second.keep()
    with pytest.raises(LeaseLost):
        await server.step()
    with pytest.raises(LeaseLost):
        await server.create(clip="b")
    assert (ledger.proposal(update).state, server.live[0]) == ("pending", 1)
    assert await sleeper.keep() and not await second.keep() and (sleeper.epoch, second.epoch) == (None, 2)


async def test_what_is_ordered_beside_the_leader_is_carried_out_by_it(leading: Server, beside: Server) -> None:
    await beside.start()
    order = await ordered(beside, "a")
    assert (await leading.step()) is not None
    outcome = await order
    assert (outcome.number, outcome.clip, outcome.kind, outcome.acknowledged) == (2, "a", "release", 0)
    leading.broadcast.broken["b"] = "damaged"
    order = await ordered(beside, "b")
    with pytest.raises(ReleaseError):
        await leading.step()
    with pytest.raises(ReleaseError, match="damaged"):
        await order


@pytest.mark.usefixtures("leading")
@pytest.mark.parametrize("preparing", [False, True])
async def test_what_is_ordered_beside_a_leader_that_stands_still_fails_and_says_so(
    beside: Server, monkeypatch: pytest.MonkeyPatch, preparing: bool
) -> None:
    monkeypatch.setattr(leadership, "FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(leadership, "STANDSTILL_SECONDS", 0.1)
    order = await ordered(beside, "a")
    (proposal,) = beside.ledger.pending_proposals()
    if preparing:
        beside.ledger.advance_proposal(proposal.id, "preparing")
    with pytest.raises(ReleaseError, match=r"the controller that leads .* has done nothing for 0.1 s"):
        await asyncio.wait_for(order, 30)
    assert beside.ledger.proposal(proposal.id).state == "failed"  # it is not carried out later


async def test_what_a_leader_prepares_for_long_is_waited_for(
    leading: Server, beside: Server, lease: ControllerLease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leadership, "FOLLOW_SECONDS", 0.01)
    monkeypatch.setattr(leadership, "STANDSTILL_SECONDS", 2.0)  # a busy machine stands still for most of a second
    leading.broadcast.gate = asyncio.Event()
    order = await ordered(beside, "a")
    step = asyncio.create_task(leading.step())
    for _ in range(50):
        await lease.keep()
        await asyncio.sleep(0.05)
    leading.broadcast.gate.set()
    await step
    assert (await order).number == 2


async def test_a_rollback_needs_no_lease_and_what_a_leader_prepares_conflicts(leading: Server, beside: Server) -> None:
    await leading.create(clip="a")
    await beside.start()
    leading.broadcast.gate = asyncio.Event()
    slow = asyncio.create_task(leading.create(clip="b"))
    await until(lambda: "b" in leading.broadcast.prepared)
    assert (await beside.back()).number == 3
    leading.broadcast.gate.set()
    with pytest.raises(ReleaseConflict):
        await slow
    assert leading.live == (3, None, None)


class Controllers:
    """Controllers of servers that share a ledger; their replicas are plain objects."""

    def __init__(self, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        self._settings = settings
        self._tasks: list[ReleaseController] = []
        monkeypatch.setattr(controllers, "Broadcast", lambda *handles: PlainBroadcast(has_vlm=False))
        monkeypatch.setattr(controllers, "POLL_SECONDS", 0.02)
        monkeypatch.setattr(controllers, "RENEW_SECONDS", 0.02)

    async def start(self) -> ReleaseController:
        handle: Any = None
        controller = ReleaseController(self._settings, handle, handle)
        await controller.check_health()
        self._tasks.append(controller)
        return controller

    def stop(self, controller: ReleaseController) -> None:
        for task in controller._loops.values():
            task.cancel()
        controller.lease.give_back()

    def stop_all(self) -> None:
        for controller in self._tasks:
            self.stop(controller)
            controller.ledger.close()


@pytest.fixture
def servers(tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controllers]:
    settings = Settings(home=tmp_path, ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")
    servers = Controllers(settings, monkeypatch)
    yield servers
    servers.stop_all()


async def test_the_second_server_follows_and_takes_over_from_the_first(servers: Controllers, ledger: Ledger) -> None:
    first = await servers.start()
    await until(lambda: first.lease.epoch is not None and ledger.live() is not None)
    second = await servers.start()
    order = ReleaseCommand(adapters={"clip": "a"}, actor="ann", reason="r", expected_live=1, force=True)
    assert isinstance(await first.change(order), ReleaseResult)
    windows = second.broadcast.windows  # type: ignore[attr-defined]
    await until(lambda: bool(windows) and windows[-1] == [2, 1])
    assert second.lease.epoch is None
    servers.stop(first)
    update = ledger.propose("update", clip="b", actor="updater", reason="passed")
    await until(lambda: ledger.proposal(update.id).state == "committed")
    assert second.lease.epoch == 2


async def test_however_many_ask_for_the_status_replicas_are_asked_once(servers: Controllers) -> None:
    controller = await servers.start()
    await until(controller._started.is_set)
    broadcast: Any = controller.broadcast
    broadcast.asked.clear()
    statuses = await asyncio.gather(*(controller.status() for _ in range(50)))
    assert broadcast.asked.count("vlm_status") == 1 and all(status["started"] for status in statuses)
    assert statuses[0]["encoders"] == [{"replica": "r1", "precision": "float32"}]
    assert statuses[0]["replicas"] == {"Encoder": {"RUNNING": 2}}


async def test_a_release_and_a_proposal_that_failed_let_unneeded_adapters_go(
    servers: Controllers, ledger: Ledger
) -> None:
    def failed() -> float:
        return REGISTRY.get_sample_value("ratchet_releases_total", {"kind": "update", "outcome": "failed"}) or 0.0

    controller = await servers.start()
    await until(lambda: ledger.live() is not None)
    replicas: Any = controller.broadcast
    replicas.broken["b"] = "damaged"
    await until(lambda: bool(replicas.loaded))
    before = failed()
    for name, state, counted in (("a", "committed", 0), ("b", "failed", 1)):
        replicas.loaded.clear()
        proposed = ledger.propose("update", clip=name, actor="updater", reason="passed")
        await until(lambda number=proposed.id, wanted=state: ledger.proposal(number).state == wanted)
        await until(lambda: bool(replicas.loaded))
        assert failed() == before + counted
    assert replicas.prepared.count("a") == 1, "it is started once"
