from __future__ import annotations

import asyncio

import pytest

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Ledger
from serving.releases.types import ReleaseResult, Residency
from tests.support.waiting import until
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, Server


async def test_the_first_start_releases_the_bases_alone_and_waits_for_encoders_only(server: Server) -> None:
    assert server.live == (1, None, None)
    assert [(row.kind, row.family) for row in server.ledger.proposals()] == [("initial", "both")]
    told = server.broadcast
    assert (told.prepared, told.prepared_vlm, told.covered) == ([None], [], [])


async def test_a_release_waits_for_the_catalog_and_is_announced_and_a_restart_goes_on_with_it(server: Server) -> None:
    made = await server.create(clip="a")
    assert (made.number, made.clip, made.acknowledged) == (2, "a", 3)
    assert server.broadcast.covered[-1] == ("i-a", True)
    assert server.broadcast.windows[-1] == [2, 1]
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
    assert server.live == (1, None, None) and server.broadcast.windows == [[1]]


async def test_replicas_that_disagree_about_spaces_are_no_release(server: Server) -> None:
    server.broadcast.spaces[(2, "a")] = "another"
    with pytest.raises(ReleaseError, match="disagree"):
        await server.create(clip="a")
    assert server.live[0] == 1


@pytest.mark.parametrize("second", [{"clip": "b"}, {"vlm": "v"}])
async def test_of_two_releases_at_once_the_second_conflicts(server: Server, second: dict[str, str]) -> None:
    orders = server.create(expected=1, clip="a"), server.create(expected=1, **second)  # type: ignore[arg-type]
    results = await asyncio.gather(*orders, return_exceptions=True)
    assert [type(result) for result in results] == [ReleaseResult, ReleaseConflict]
    assert server.live == (2, "a", None)


async def test_another_process_that_commits_in_between_wins(server: Server) -> None:
    server.broadcast.gate = asyncio.Event()
    ours = asyncio.create_task(server.create(clip="a"))
    await until(lambda: "a" in server.broadcast.prepared)
    server.ledger.commit_release(2, clip="b", vlm=None, actor="other", reason="fast", proposal_id=None)
    server.broadcast.gate.set()
    with pytest.raises(ReleaseConflict):
        await ours
    assert server.live[1] == "b" and server.ledger.proposals(1)[0].state == "failed"


async def covering(server: Server, **adapters: str) -> asyncio.Task[ReleaseResult]:
    """A release of b whose catalog is not complete until ``unstick`` is set."""
    server.broadcast.stuck = "i-b"
    slow = asyncio.create_task(server.create(clip="b", **adapters))  # type: ignore[arg-type]
    await until(lambda: ("i-b", True) in server.broadcast.covered)
    return slow


async def test_what_is_being_prepared_is_not_retired(server: Server) -> None:
    slow = await covering(server, vlm="v")
    await server.retire()
    assert server.broadcast.kept == [[1, 2]]
    assert server.broadcast.loaded == [(None, "b", None, "v")]
    slow.cancel()


async def test_what_is_prepared_while_replicas_unload_others_is_announced(server: Server) -> None:
    await server.create(clip="a")
    server.broadcast.retire_gate = asyncio.Event()
    retiring = asyncio.create_task(server.retire())
    await until(lambda: server.broadcast.loaded)
    slow = await covering(server)
    server.broadcast.retire_gate.set()
    await retiring
    server.broadcast.unstick.set()
    assert (await slow).acknowledged == 3
    assert server.broadcast.windows[-1] == [3, 2]


@pytest.mark.parametrize("when", [2, 3])  # the first look counts requests in flight
async def test_what_is_committed_while_retire_looks_what_is_resident_stays_loaded(
    server: Server, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
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
    assert server.broadcast.kept == [[1, 2]]
    assert [set(loaded) for loaded in server.broadcast.loaded] == [{None, "b"}]


async def test_a_release_is_retired_only_when_none_of_its_requests_is_in_flight(server: Server) -> None:
    await server.create(clip="a")
    await server.create(clip="b")
    server.broadcast.flight = {1: 1, 3: 5}
    await server.retire(patience_seconds=0.2)
    assert server.broadcast.kept == []
    server.broadcast.flight = {2: 1, 3: 5}
    await server.retire()
    assert server.broadcast.kept == [[3, 2]]


async def test_updates_wait_while_held_and_operators_do_not(server: Server) -> None:
    server.propose()
    server.ledger.hold("me", "looking")
    assert await server.step() is None
    assert (await server.create(clip="b")).number == 2
    server.ledger.resume("me", "fine")
    taken = await server.step()
    assert taken is not None and (taken.clip, taken.kind) == ("a", "update")


async def test_updates_of_a_vlm_that_starts_let_those_of_clip_pass(server: Server) -> None:
    server.propose("vlm", "v", "v")
    server.propose("clip", "a", "a")
    server.broadcast.vlm_up = False
    assert await server.step() is not None and await server.step() is None
    assert server.live == (2, "a", None)
    server.broadcast.vlm_up = True
    assert await server.step() is not None
    assert server.live == (3, "a", "v")


async def test_a_proposal_left_in_preparing_is_taken_up(server: Server) -> None:
    left = server.propose()
    server.ledger.advance_proposal(left, "preparing")
    again = Server(server.ledger)
    await again.start()
    taken = await again.step()
    assert taken is not None and taken.proposal == left
    assert server.ledger.proposal(left).state == "committed"


async def test_a_release_of_one_family_keeps_the_other_and_does_not_prepare_it(server: Server) -> None:
    await server.create(clip="a")
    told = server.broadcast
    covered = list(told.covered)
    made = await server.create(vlm="v")
    assert (made.clip, made.vlm, made.family) == ("a", "v", "vlm")
    assert (told.prepared, told.prepared_vlm) == ([None, "a"], ["v"])
    assert told.covered == covered, "the catalog has nothing to do with a VLM"


async def test_an_update_of_one_keeps_what_was_released_of_the_other_in_between(server: Server) -> None:
    server.propose("clip", "a", "stale")
    await server.create(vlm="v")
    await server.step()
    assert server.live == (3, "a", "v")
    server.propose("vlm", "w", "stale")
    await server.create(clip="b")
    await server.step()
    assert server.live == (5, "b", "w")


async def test_what_a_rollback_of_clip_goes_back_to_stays_indexed_behind_vlm_releases(server: Server) -> None:
    await server.create(clip="a")
    for name in ("v", "w", "x"):
        await server.create(vlm=name)
    assert (server.broadcast.windows[-1], server.broadcast.indexed[-1]) == ([5, 4], [5, 4, 1])
    await server.back("clip")
    assert server.live == (6, None, "x")
    assert server.broadcast.covered[-1] == ("i-a", True), "its index is complete: the catalog is not asked"


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
