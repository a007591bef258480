"""The release protocol without Ray: proposals, their preparation and commit, two families, and what is retired."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Ledger
from serving.releases.protocol import ReleaseProtocol
from serving.releases.types import ReleaseCommand, ReleaseResult, Residency
from tests.support.waiting import until
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, back, live, release


def order(protocol: ReleaseProtocol, actor: str, **adapters: str) -> asyncio.Task[ReleaseResult]:
    """A release that somebody else orders, after a look at release 1."""
    named: Any = adapters
    command = ReleaseCommand(adapters=named, actor=actor, reason="race", expected_live=1)
    return asyncio.create_task(protocol.release(command))


async def test_the_first_start_releases_the_bases_alone_and_waits_for_encoders_only(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger
) -> None:
    assert live(protocol)[:3] == (1, None, None)
    assert [(row.kind, row.family) for row in ledger.proposals()] == [("initial", "both")]
    assert (broadcast.prepared, broadcast.prepared_vlm, broadcast.covered) == ([None], [], [])


async def test_a_restart_goes_on_with_what_is_live(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    await release(protocol, clip="a")
    broadcast: Any = PlainBroadcast()
    assert await ReleaseProtocol(ledger, broadcast, window=2).start() is None
    assert broadcast.windows == [[2, 1]]
    assert broadcast.covered == [("i-a", False), ("i-None", False)]


async def test_a_release_waits_for_the_catalog_and_is_announced(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    made = await release(protocol, clip="a")
    assert (made.number, made.clip, made.acknowledged) == (2, "a", 3)
    assert broadcast.covered[-1] == ("i-a", True)
    assert broadcast.windows[-1] == [2, 1]


@pytest.mark.parametrize("broken", ["a", "v"])
async def test_when_one_of_two_cannot_be_served_neither_goes_live(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger, broken: str
) -> None:
    broadcast.broken[broken] = "its golden answers are not finite"
    with pytest.raises(ReleaseError, match=f"{broken} cannot be served: its golden answers"):
        await release(protocol, clip="a", vlm="v")
    failed = ledger.proposals(1)[0]
    assert failed.state == "failed" and "golden" in (failed.error or "")
    assert live(protocol)[:3] == (1, None, None)
    assert broadcast.windows == [[1]]


async def test_replicas_that_disagree_about_spaces_are_no_release(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    broadcast.spaces[(2, "a")] = "another"
    with pytest.raises(ReleaseError, match="disagree"):
        await release(protocol, clip="a")
    assert live(protocol)[0] == 1


@pytest.mark.parametrize("second", [{"clip": "b"}, {"vlm": "v"}])
async def test_of_two_releases_at_once_the_second_conflicts(protocol: ReleaseProtocol, second: dict[str, str]) -> None:
    results = await asyncio.gather(
        order(protocol, "ann", clip="a"), order(protocol, "bob", **second), return_exceptions=True
    )
    assert [type(result) for result in results] == [ReleaseResult, ReleaseConflict]
    assert live(protocol)[:3] == (2, "a", None)


async def test_another_process_that_commits_in_between_wins(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger
) -> None:
    broadcast.gate = asyncio.Event()
    ours = order(protocol, "me", clip="a")
    await until(lambda: "a" in broadcast.prepared)
    ledger.commit_release(2, clip="b", vlm=None, actor="other", reason="fast", proposal_id=None)
    broadcast.gate.set()
    with pytest.raises(ReleaseConflict):
        await ours
    assert live(protocol)[1] == "b"
    assert ledger.proposals(1)[0].state == "failed"


async def test_what_is_being_prepared_is_not_retired(protocol: ReleaseProtocol, broadcast: PlainBroadcast) -> None:
    broadcast.stuck = "i-b"
    slow = order(protocol, "you", clip="b", vlm="v")
    await until(lambda: ("i-b", True) in broadcast.covered)
    await protocol.retire()
    assert broadcast.kept == [[1, 2]]
    assert broadcast.loaded == [(None, "b", None, "v")]
    slow.cancel()


async def test_what_is_prepared_while_replicas_unload_others_is_announced(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, clip="a")
    broadcast.retire_gate = asyncio.Event()
    retiring = asyncio.create_task(protocol.retire())
    await until(lambda: broadcast.loaded)
    broadcast.stuck = "i-b"
    slow = asyncio.create_task(release(protocol, clip="b"))
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
    slow = asyncio.create_task(release(protocol, clip="b"))
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


async def test_a_release_is_retired_only_when_none_of_its_requests_is_in_flight(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, clip="a")
    await release(protocol, clip="b")
    broadcast.flight = {1: 1, 3: 5}
    await protocol.retire(patience_seconds=0.2)
    assert broadcast.kept == []
    broadcast.flight = {2: 1, 3: 5}
    await protocol.retire()
    assert broadcast.kept == [[3, 2]]


async def test_updates_wait_while_held_and_operators_do_not(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    ledger.propose("update", clip="a", vlm=None, actor="updater", reason="passed")
    ledger.hold("me", "looking")
    assert await protocol.step() is None
    assert (await release(protocol, clip="b")).number == 2
    ledger.resume("me", "fine")
    taken = await protocol.step()
    assert taken is not None and (taken.clip, taken.kind) == ("a", "update")


async def test_updates_of_a_vlm_that_starts_let_those_of_clip_pass(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, ledger: Ledger
) -> None:
    for family, name in (("vlm", "v"), ("clip", "a")):
        ledger.propose("update", family=family, clip=name, vlm=name, actor="updater", reason="passed")
    broadcast.vlm_up = False
    assert await protocol.step() is not None
    assert await protocol.step() is None
    assert live(protocol)[:3] == (2, "a", None)
    broadcast.vlm_up = True
    assert await protocol.step() is not None
    assert live(protocol)[:3] == (3, "a", "v")


async def test_a_proposal_left_in_preparing_is_taken_up(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    left = ledger.propose("update", clip="a", vlm=None, actor="updater", reason="passed")
    ledger.advance_proposal(left.id, "preparing")
    replicas: Any = PlainBroadcast()
    again = ReleaseProtocol(ledger, replicas, window=2)
    await again.start()
    taken = await again.step()
    assert taken is not None and taken.proposal == left.id
    assert ledger.proposal(left.id).state == "committed"


async def test_a_committed_release_stands_when_no_replica_acknowledges(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    broadcast.deaf = True
    assert (await release(protocol, clip="a")).acknowledged == 0
    assert live(protocol)[1] == "a"


async def test_a_release_of_one_family_keeps_the_other_and_does_not_prepare_it(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, clip="a")
    covered = list(broadcast.covered)
    made = await release(protocol, vlm="v")
    assert (made.clip, made.vlm, made.family) == ("a", "v", "vlm")
    assert (broadcast.prepared, broadcast.prepared_vlm) == ([None, "a"], ["v"])
    assert broadcast.covered == covered, "the catalog has nothing to do with a VLM"


async def test_an_update_of_one_keeps_what_was_released_of_the_other_in_between(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    ledger.propose("update", family="clip", clip="a", vlm="stale", actor="updater", reason="passed")
    await release(protocol, vlm="v")
    await protocol.step()
    assert live(protocol)[:3] == (3, "a", "v")
    ledger.propose("update", family="vlm", vlm="w", clip="stale", actor="updater", reason="passed")
    await release(protocol, clip="b")
    await protocol.step()
    assert live(protocol)[:3] == (5, "b", "w")


async def test_what_a_rollback_of_clip_goes_back_to_stays_indexed_behind_vlm_releases(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, clip="a")
    for name in ("v", "w", "x"):
        await release(protocol, vlm=name)
    assert (broadcast.windows[-1], broadcast.indexed[-1]) == ([5, 4], [5, 4, 1])
    await back(protocol, "clip")
    assert live(protocol)[:3] == (6, None, "x")
    assert broadcast.covered[-1] == ("i-a", True), "its index is complete: the catalog is not asked"


async def test_vlm_replicas_keep_what_a_rollback_goes_back_to_and_never_more_than_the_window(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    for adapters in ({"vlm": "v"}, {"vlm": "w"}, {"clip": "a"}, {"clip": "b"}):
        await release(protocol, **adapters)  # type: ignore[arg-type]
    assert broadcast.vlms[-1] == ("w", "v")
    await release(protocol, vlm="x")
    assert broadcast.vlms[-1] == ("x", "w")


async def test_without_vlm_replicas_only_clip_is_released(ledger: Ledger) -> None:
    broadcast: Any = PlainBroadcast(has_vlm=False)
    protocol = ReleaseProtocol(ledger, broadcast, window=2)
    await protocol.start()
    await release(protocol, clip="a")
    with pytest.raises(ReleaseError, match="no vision-language model is served"):
        await release(protocol, vlm="v")
    await back(protocol)
    assert live(protocol)[:3] == (3, None, None)
    assert broadcast.prepared_vlm == []
