"""The release protocol without Ray: replicas that are plain objects, and a real ledger."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Ledger
from serving.releases.commands import ReleaseCommand, RollbackCommand
from serving.releases.protocol import ReleaseProtocol
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.types import Prepared, ReleaseResult, Residency
from tests.support.waiting import until


@dataclass
class PlainBroadcast:
    """Two encoders that can serve everything but what is named in ``broken``."""

    broken: dict[str, str] = field(default_factory=dict)
    spaces: dict[tuple[int, str | None], str] = field(default_factory=dict)
    covered: list[tuple[str, bool]] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    flight: dict[int, int] = field(default_factory=dict)
    kept: list[list[int]] = field(default_factory=list)
    prepared: list[str | None] = field(default_factory=list)
    prepared_vlm: list[str | None] = field(default_factory=list)
    vlms: list[tuple[str | None, ...]] = field(default_factory=list)
    indexed: list[list[int]] = field(default_factory=list)
    answering: list[ReleaseSnapshot] = field(default_factory=list)
    loaded: list[tuple[str | None, ...]] = field(default_factory=list)
    has_vlm: bool = True
    vlm_up: bool = True
    deaf: bool = False
    stuck: str = ""
    unstick: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event | None = None
    retire_gate: asyncio.Event | None = None

    async def prepare(self, clip: str | None) -> list[Prepared]:
        self.prepared.append(clip)
        if self.gate is not None:
            await self.gate.wait()
        error = self.broken.get(clip or "", "")
        return [
            Prepared(f"r{replica}", clip, self.spaces.get((replica, clip), f"i-{clip}"), f"t-{clip}", error)
            for replica in (1, 2)
        ]

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        self.prepared_vlm.append(vlm)
        if self.gate is not None:
            await self.gate.wait()
        return [Prepared("v1", vlm, error=self.broken.get(vlm or "", ""))]

    async def vlm_answers(self) -> bool:
        return self.vlm_up

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool) -> int:
        self.covered.append((snapshot.image_space, wait))
        if snapshot.image_space == self.stuck:
            await self.unstick.wait()
        return 7

    async def resident(self) -> list[ReleaseSnapshot]:
        return list(self.answering)

    async def announce(self, resident: Residency, seconds: float) -> int:
        if self.deaf:
            raise ReleaseError("nobody answers")
        self.windows.append([snapshot.release for snapshot in resident.window])
        self.indexed.append([snapshot.release for snapshot in resident.indexed])
        self.vlms.append(resident.vlms)
        return 3

    async def in_flight(self) -> dict[int, int]:
        return dict(self.flight)

    async def retire_spaces(self, keep: Sequence[ReleaseSnapshot], epoch: int | None) -> None:
        self.kept.append([snapshot.release for snapshot in keep])

    async def retire(self, clips: Sequence[str | None], vlms: Sequence[str | None]) -> None:
        self.loaded.append((*clips, *vlms))
        if self.retire_gate is not None:
            await self.retire_gate.wait()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
    for name in ("a", "b", "c"):
        made.register_adapter(name, family="clip", base="x", image_space=f"i-{name}", text_space="t", meta={})
    yield made
    made.close()


@pytest.fixture
def broadcast() -> PlainBroadcast:
    return PlainBroadcast()


@pytest.fixture
async def protocol(ledger: Ledger, broadcast: PlainBroadcast) -> ReleaseProtocol:
    made = ReleaseProtocol(ledger, broadcast, window=2)
    await made.start()
    return made


async def release(protocol: ReleaseProtocol, clip: str | None) -> ReleaseResult:
    live = protocol.ledger.live()
    assert live is not None
    return await protocol.release(
        ReleaseCommand(adapters={"clip": clip}, actor="me", reason="test", expected_live=live.number)
    )


async def test_the_first_start_releases_the_base_alone(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    live = ledger.live()
    assert live is not None
    assert (live.number, live.clip, ledger.proposals(1)[0].kind) == (1, None, "initial")


async def test_a_restart_goes_on_with_what_is_live(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    await release(protocol, "a")
    broadcast = PlainBroadcast()
    assert await ReleaseProtocol(ledger, broadcast, window=2).start() is None
    assert broadcast.windows == [[2, 1]]
    assert broadcast.covered == [("i-a", False), ("i-None", False)]


async def test_a_release_waits_for_the_catalog_and_is_announced(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    made = await release(protocol, "a")
    assert (made.number, made.clip, made.acknowledged) == (2, "a", 3)
    assert broadcast.covered[-1] == ("i-a", True)
    assert broadcast.windows[-1] == [2, 1]


async def test_what_cannot_be_served_leaves_the_live_release(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger
) -> None:
    broadcast.broken["b"] = "its file is damaged"
    with pytest.raises(ReleaseError, match="its file is damaged"):
        await release(protocol, "b")
    assert ledger.live().number == 1  # type: ignore[union-attr]
    failed = ledger.proposals(1)[0]
    assert failed.state == "failed"
    assert "damaged" in (failed.error or "")
    assert broadcast.windows == [[1]]


async def test_replicas_that_disagree_about_spaces_are_no_release(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger
) -> None:
    broadcast.spaces[(2, "a")] = "another"
    with pytest.raises(ReleaseError, match="disagree"):
        await release(protocol, "a")
    assert ledger.live().number == 1  # type: ignore[union-attr]


async def test_of_two_releases_at_once_the_second_conflicts(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    results = await asyncio.gather(
        *(
            protocol.release(ReleaseCommand(adapters={"clip": clip}, actor=clip, reason="race", expected_live=1))
            for clip in ("a", "b")
        ),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [ReleaseResult, ReleaseConflict]
    assert ledger.live().clip == "a"  # type: ignore[union-attr]


async def test_another_process_that_commits_in_between_wins(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger
) -> None:
    broadcast.gate = asyncio.Event()
    ours = asyncio.create_task(
        protocol.release(ReleaseCommand(adapters={"clip": "a"}, actor="me", reason="slow", expected_live=1))
    )
    await until(lambda: "a" in broadcast.prepared)
    ledger.commit_release(2, clip="b", vlm=None, actor="other", reason="fast", proposal_id=None)
    broadcast.gate.set()
    with pytest.raises(ReleaseConflict):
        await ours
    assert ledger.live().clip == "b"  # type: ignore[union-attr]
    assert ledger.proposals(1)[0].state == "failed"


async def test_rollback_takes_the_newest_other_adapter_and_does_not_wait_for_the_catalog(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, "a")
    await release(protocol, "b")
    back = await protocol.rollback(RollbackCommand(actor="me", reason="bad", expected_live=3))
    assert (back.number, back.clip, back.kind) == (4, "a", "rollback")
    assert broadcast.covered[-1] == ("i-b", True)  # nothing was asked of the catalog
    assert broadcast.windows[-1] == [4, 3]
    far = await protocol.rollback(RollbackCommand(actor="me", reason="worse", expected_live=4, to=1))
    assert far.clip is None
    assert broadcast.covered[-1] == ("i-None", True)  # not resident any more, so its index is made first


async def test_a_rollback_does_not_queue_behind_a_long_preparation(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger
) -> None:
    await release(protocol, "a")
    broadcast.stuck = "i-b"
    slow = asyncio.create_task(
        protocol.release(ReleaseCommand(adapters={"clip": "b"}, actor="you", reason="slow", expected_live=2))
    )
    await until(lambda: ("i-b", True) in broadcast.covered)
    back = await asyncio.wait_for(protocol.rollback(RollbackCommand(actor="me", reason="bad", expected_live=2)), 5)
    assert (back.number, back.clip) == (3, None)
    with pytest.raises(ReleaseConflict, match="me rolled back while it was being prepared"):
        await slow
    assert [(row.clip, row.state) for row in ledger.proposals(2)] == [(None, "committed"), ("b", "failed")]
    assert (await release(protocol, "c")).number == 4


async def test_what_is_being_prepared_is_not_retired(protocol: ReleaseProtocol, broadcast: PlainBroadcast) -> None:
    broadcast.stuck = "i-b"
    slow = asyncio.create_task(
        protocol.release(ReleaseCommand(adapters={"clip": "b", "vlm": "v"}, actor="you", reason="", expected_live=1))
    )
    await until(lambda: ("i-b", True) in broadcast.covered)
    await protocol.retire()
    assert broadcast.kept == [[1, 2]]
    assert broadcast.loaded == [(None, "b", None, "v")]
    slow.cancel()


async def test_what_is_prepared_while_replicas_unload_others_is_announced(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, "a")
    broadcast.retire_gate = asyncio.Event()
    retiring = asyncio.create_task(protocol.retire())
    await until(lambda: broadcast.loaded)
    broadcast.stuck = "i-b"
    slow = asyncio.create_task(release(protocol, "b"))
    await until(lambda: ("i-b", True) in broadcast.covered)
    broadcast.retire_gate.set()
    await retiring
    broadcast.unstick.set()
    assert (await slow).acknowledged == 3
    assert broadcast.windows[-1] == [3, 2]


@pytest.mark.parametrize("when", [2, 3])  # the first look asks what is in flight
async def test_what_is_committed_while_retire_looks_what_is_resident_stays_loaded(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    broadcast.stuck = "i-b"
    slow = asyncio.create_task(release(protocol, "b"))
    await until(lambda: ("i-b", True) in broadcast.covered)
    residency, looks = protocol.residency, 0

    async def outdated() -> Residency:
        nonlocal looks
        looks += 1
        found = await residency()
        if looks == when:
            broadcast.unstick.set()
            await slow
        return found

    monkeypatch.setattr(protocol, "residency", outdated)
    await protocol.retire()
    assert broadcast.kept == [[1, 2]]
    assert [set(loaded) for loaded in broadcast.loaded] == [{None, "b"}]


async def test_a_rollback_with_nothing_behind_says_so(protocol: ReleaseProtocol) -> None:
    with pytest.raises(ReleaseError, match="no release before 1"):
        await protocol.rollback(RollbackCommand(actor="me", reason="bad", expected_live=1))
    with pytest.raises(ReleaseError, match="release 9 does not exist"):
        await protocol.rollback(RollbackCommand(actor="me", reason="bad", expected_live=1, to=9))


async def test_updates_wait_while_held_and_operators_do_not(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    ledger.propose("update", clip="a", vlm=None, actor="updater", reason="passed")
    ledger.hold("me", "looking")
    assert await protocol.step() is None
    assert (await release(protocol, "b")).number == 2
    ledger.resume("me", "fine")
    taken = await protocol.step()
    assert taken is not None
    assert (taken.clip, taken.kind) == ("a", "update")


async def test_a_proposal_left_in_preparing_is_taken_up(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    left = ledger.propose("update", clip="a", vlm=None, actor="updater", reason="passed")
    ledger.advance_proposal(left.id, "preparing")
    again = ReleaseProtocol(ledger, PlainBroadcast(), window=2)
    await again.start()
    taken = await again.step()
    assert taken is not None
    assert taken.proposal == left.id
    assert ledger.proposal(left.id).state == "committed"


async def test_a_committed_release_stands_when_nobody_acknowledges(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger
) -> None:
    broadcast.deaf = True
    made = await release(protocol, "a")
    assert made.acknowledged == 0
    assert ledger.live().clip == "a"  # type: ignore[union-attr]


async def test_a_release_is_retired_only_when_none_of_its_requests_is_in_flight(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, "a")
    await release(protocol, "b")
    broadcast.flight = {1: 1, 3: 5}
    await protocol.retire(patience_seconds=0.2)
    assert broadcast.kept == []
    broadcast.flight = {2: 1, 3: 5}
    await protocol.retire()
    assert broadcast.kept == [[3, 2]]
