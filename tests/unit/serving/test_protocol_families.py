"""Releases of two models: each is released and taken back alone, and what is not named stays what is live."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Family, Ledger
from serving.releases.commands import ReleaseCommand, RollbackCommand
from serving.releases.protocol import ReleaseProtocol
from serving.releases.types import ReleaseResult
from tests.support.waiting import until
from tests.unit.serving.test_protocol import PlainBroadcast


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    made = Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
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


async def release(protocol: ReleaseProtocol, **adapters: str | None) -> ReleaseResult:
    live = protocol.ledger.live()
    assert live is not None
    named: dict[Family, str | None] = {family: adapters[family] for family in ("clip", "vlm") if family in adapters}
    return await protocol.release(ReleaseCommand(adapters=named, actor="me", reason="test", expected_live=live.number))


async def back(protocol: ReleaseProtocol, family: Family | None = None, to: int | None = None) -> ReleaseResult:
    live = protocol.ledger.live()
    assert live is not None
    return await protocol.rollback(
        RollbackCommand(actor="me", reason="bad", expected_live=live.number, family=family, to=to)
    )


def live(protocol: ReleaseProtocol) -> tuple[int, str | None, str | None]:
    row = protocol.ledger.live()
    assert row is not None
    return row.number, row.clip, row.vlm


async def test_the_first_start_waits_for_encoders_only(protocol: ReleaseProtocol, broadcast: PlainBroadcast) -> None:
    assert (broadcast.prepared, broadcast.prepared_vlm, broadcast.covered) == ([None], [], [])
    assert protocol.ledger.proposals(1)[0].family == "both"


async def test_updates_of_a_vlm_that_starts_let_those_of_clip_pass(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    ledger = protocol.ledger
    for family, name in (("vlm", "v"), ("clip", "a")):
        ledger.propose("update", family=family, clip=name, vlm=name, actor="updater", reason="passed")
    broadcast.vlm_up = False
    assert await protocol.step() is not None
    assert await protocol.step() is None
    assert live(protocol) == (2, "a", None)
    broadcast.vlm_up = True
    assert await protocol.step() is not None
    assert live(protocol) == (3, "a", "v")


async def test_a_release_of_one_keeps_the_other_and_does_not_prepare_it(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, clip="a")
    made = await release(protocol, vlm="v")
    assert (made.clip, made.vlm, made.family) == ("a", "v", "vlm")
    assert broadcast.prepared == [None, "a"]
    assert broadcast.prepared_vlm == ["v"]


async def test_a_release_of_a_vlm_adapter_leaves_the_catalog_alone(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    before = list(broadcast.covered)
    await release(protocol, vlm="v")
    assert broadcast.covered == before


async def test_both_can_be_released_at_once(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a", vlm="v")
    assert live(protocol) == (2, "a", "v")


async def test_an_update_of_one_keeps_what_was_released_of_the_other_in_between(protocol: ReleaseProtocol) -> None:
    protocol.ledger.propose("update", family="clip", clip="a", vlm="stale", actor="updater", reason="passed")
    await release(protocol, vlm="v")
    await protocol.step()
    assert live(protocol) == (3, "a", "v")
    protocol.ledger.propose("update", family="vlm", vlm="w", clip="stale", actor="updater", reason="passed")
    await release(protocol, clip="b")
    await protocol.step()
    assert live(protocol) == (5, "b", "w")


async def test_a_rollback_of_one_keeps_the_other(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    await release(protocol, vlm="v")
    await release(protocol, clip="b", vlm="w")
    assert (await back(protocol, "vlm")).family == "vlm"
    assert live(protocol) == (5, "b", "v")
    await back(protocol, "clip")
    assert live(protocol) == (6, "a", "v")
    await back(protocol, "vlm", to=1)
    assert live(protocol) == (7, "a", None)


async def test_a_rollback_of_everything_goes_back_to_the_newest_other_pair(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    await release(protocol, vlm="v")
    await back(protocol)
    assert live(protocol) == (4, "a", None)
    await back(protocol, to=1)
    assert live(protocol) == (5, None, None)


async def test_a_rollback_of_a_family_that_never_changed_says_so(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    with pytest.raises(ReleaseError, match="no release before 2 has another VLM adapter"):
        await back(protocol, "vlm")


async def test_what_a_rollback_of_clip_goes_back_to_stays_indexed_behind_vlm_releases(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, clip="a")
    for name in ("v", "w", "x"):
        await release(protocol, vlm=name)
    assert (broadcast.windows[-1], broadcast.indexed[-1]) == ([5, 4], [5, 4, 1])
    await back(protocol, "clip")
    assert live(protocol) == (6, None, "x")
    assert broadcast.covered[-1] == ("i-a", True)  # its index is complete: the catalog is not asked


async def test_vlm_replicas_keep_what_a_rollback_goes_back_to_and_never_more_than_the_window(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, vlm="v")
    await release(protocol, vlm="w")
    await release(protocol, clip="a")
    await release(protocol, clip="b")
    assert broadcast.vlms[-1] == ("w", "v")
    await release(protocol, vlm="x")
    assert broadcast.vlms[-1] == ("x", "w")


@pytest.mark.parametrize("broken", ["a", "v"])
async def test_when_one_of_two_cannot_be_served_neither_goes_live(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, broken: str
) -> None:
    broadcast.broken[broken] = "its golden answers are not finite"
    with pytest.raises(ReleaseError, match=f"{broken} cannot be served: its golden answers"):
        await release(protocol, clip="a", vlm="v")
    assert live(protocol) == (1, None, None)
    assert broadcast.windows == [[1]]


async def test_of_two_operators_of_different_families_the_second_conflicts(protocol: ReleaseProtocol) -> None:
    results = await asyncio.gather(
        protocol.release(ReleaseCommand(adapters={"clip": "a"}, actor="ann", reason="race", expected_live=1)),
        protocol.release(ReleaseCommand(adapters={"vlm": "v"}, actor="bob", reason="race", expected_live=1)),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [ReleaseResult, ReleaseConflict]
    assert live(protocol) == (2, "a", None)


async def test_an_update_waits_while_the_other_family_is_rolled_back(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, vlm="v")
    broadcast.stuck = "i-a"
    proposal = protocol.ledger.propose("update", family="clip", clip="a", actor="updater", reason="passed")
    stepping = asyncio.create_task(protocol.step())
    await until(lambda: ("i-a", True) in broadcast.covered)
    await asyncio.wait_for(back(protocol, "vlm"), 5)
    assert await stepping is None
    assert live(protocol) == (3, None, None)
    assert protocol.ledger.proposal(proposal.id).state == "pending"
    broadcast.stuck = ""
    await protocol.step()
    assert live(protocol) == (4, "a", None)


async def test_an_update_judged_against_what_is_taken_back_fails(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, clip="a")
    broadcast.stuck = "i-b"
    proposal = protocol.ledger.propose("update", family="clip", clip="b", actor="updater", reason="passed")
    stepping = asyncio.create_task(protocol.step())
    await until(lambda: ("i-b", True) in broadcast.covered)
    await asyncio.wait_for(back(protocol, "clip"), 5)
    with pytest.raises(ReleaseConflict, match="me rolled back"):
        await stepping
    assert protocol.ledger.proposal(proposal.id).state == "failed"


async def test_without_vlm_replicas_only_clip_is_released(ledger: Ledger) -> None:
    broadcast = PlainBroadcast(has_vlm=False)
    protocol = ReleaseProtocol(ledger, broadcast, window=2)
    await protocol.start()
    await release(protocol, clip="a")
    with pytest.raises(ReleaseError, match="no vision-language model is served"):
        await release(protocol, vlm="v")
    await back(protocol)
    assert live(protocol) == (3, None, None)
    assert broadcast.prepared_vlm == []
