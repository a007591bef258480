from __future__ import annotations

import time
from datetime import timedelta

import pytest

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Ledger
from core.ledger import rows as t
from core.settings.serving import Rollout
from serving.releases.auto_rollback import Guard
from serving.releases.guard import ComparisonCounts, Observations, RequestCounts, find_guard_target
from serving.releases.residency import read_residency
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, Server

SETTINGS = Rollout(observe_seconds=60, min_comparisons=20)
GOOD, BAD = (
    ComparisonCounts(inputs=40, agreed=39, timed=40, tried=40),
    ComparisonCounts(inputs=40, agreed=2, timed=40, tried=40),
)


@pytest.fixture
async def server(ledger: Ledger) -> Server:
    made = Server(ledger, update_share=0.1)
    await made.start()
    return made


def guard(server: Server, **compared: ComparisonCounts) -> Guard:
    number, counts = server.live[0], compared
    server.broadcast.seen = [Observations(number, {number: RequestCounts(50)}, counts)]  # type: ignore[arg-type]
    return Guard(server, SETTINGS)


def age(server: Server, seconds: float) -> None:
    with server.ledger.database.write() as session:
        for row in session.query(t.ReleaseRow):
            row.created_at -= timedelta(seconds=seconds)


async def test_a_canary_leaves_the_stable_release_resident_and_a_restart_needs_both(server: Server) -> None:
    await server.create(clip="a")
    for share in (0.0, 0.1, 0.5):
        await server.create(share, clip="b")
    assert server.broadcast.windows[-1] == [5, 2]
    rows = read_residency(server.ledger, 2)
    assert [(row.number, row.share) for row in rows.answering] == [(5, 0.5), (2, 1.0)]
    assert rows.clips == ("b", "a")
    again = Server(server.ledger)
    assert await again.start() is None
    assert again.broadcast.windows == [[5, 2]]
    with pytest.raises(ReleaseError, match="a cannot be served: gone"):
        await Server(server.ledger, PlainBroadcast(broken={"a": "gone"})).start()


async def test_a_promotion_is_a_plain_release_of_the_same_adapters_without_preparation(server: Server) -> None:
    await server.create(0.1, clip="a", vlm="v")
    told = server.broadcast
    prepared = list(told.prepared), list(told.prepared_vlm)
    with pytest.raises(ReleaseConflict):
        await server.promote_live(expected=1)
    made = await server.promote_live()
    assert (server.live, made.kind, made.share) == ((3, "a", "v"), "promotion", 1.0)
    assert (told.prepared, told.prepared_vlm) == prepared and told.windows[-1] == [3, 1]
    with pytest.raises(ReleaseError, match="nothing can be promoted"):
        await server.promote_live()


async def test_what_comes_after_a_trial_starts_from_what_answers_next_to_it(server: Server) -> None:
    await server.create(clip="a", vlm="v")
    await server.create(0.1, clip="b")
    await server.back()
    assert server.live == (4, "a", "v") and server.live_row.plain
    await server.create(0.1, vlm="w")
    await server.back("vlm")
    assert server.live == (6, "a", "v")
    await server.create(0.1, clip="b")
    await server.create(vlm="x")
    assert server.live == (8, "a", "x") and server.live_row.plain, "the trial is not promoted by the way"


@pytest.mark.parametrize(("share", "kind"), [(0.0, "shadow"), (0.1, "canary")])
async def test_a_rollback_goes_to_a_trial_only_if_it_was_promoted(server: Server, share: float, kind: str) -> None:
    await server.create(share, clip="a")
    await server.back()
    with pytest.raises(ReleaseError, match="no release before 3 has another"):
        await server.back()
    with pytest.raises(ReleaseError, match=f"was a {kind} that was never promoted: a never answered all"):
        await server.back(to=2)
    assert server.live[0] == 3
    await server.create(share, clip="a")
    await server.promote_live()
    await server.create(clip="b")
    await server.back(to=2)
    assert server.live == (7, "a", None) and server.live_row.plain


async def test_an_update_is_a_canary_by_the_settings_and_the_next_one_waits_for_its_end(server: Server) -> None:
    server.propose(name="a")
    server.propose(name="b")
    await server.step()
    assert (server.live, server.live_row.share) == ((2, "a", None), 0.1)
    assert await server.step() is None
    await server.promote_live()
    await server.step()
    assert (server.live, server.live_row.share) == ((4, "b", None), 0.1)
    assert server.ledger.stable() == server.ledger.release(3)


async def test_an_update_that_makes_a_withdrawn_adapter_again_fails(server: Server) -> None:
    server.ledger.withdraw(["a"], actor="guard", subject="release 9", reason="disagrees", evidence={})
    update = server.propose()
    with pytest.raises(ReleaseError, match="a was withdrawn: disagrees"):
        await server.step()
    assert (server.ledger.proposal(update).state, server.live[0]) == ("failed", 1)


async def test_the_guard_takes_a_bad_release_back_once_and_says_why(server: Server) -> None:
    await server.create(clip="a", vlm="v")
    await server.create(clip="b")
    watching = guard(server, clip=BAD)
    made = await watching.step()
    assert made is not None
    assert (made.kind, server.live) == ("rollback", (4, "a", "v"))
    row = next(row for row in server.ledger.audit_rows() if row.action == "withdraw")
    assert (row.actor, row.subject, row.detail["adapters"], row.detail["back_to"]) == ("guard", "release 3", ["b"], 2)
    assert row.detail["compared"]["clip"]["inputs"] == 40
    assert [one["guardrail"] for one in row.detail["guardrails"] if one["broken"]] == ["agreement"]
    assert server.live_row.reason == row.detail["reason"]
    assert await watching.step() is None  # a rollback is not guarded, to avoid flapping
    assert watching.status() == {"state": "idle"}
    assert server.live[0] == 4


async def test_the_guard_goes_back_from_a_canary_while_held_and_to_what_was_withdrawn_once(server: Server) -> None:
    server.ledger.withdraw(["a"], actor="guard", subject="release 9", reason="disagrees", evidence={})
    await server.create(clip="a")  # an operator forced it
    await server.create(0.1, clip="b")
    server.ledger.hold("me", "quiet")
    assert (await guard(server, clip=BAD).step()) is not None
    assert server.live == (4, "a", None) and server.live_row.plain


async def test_a_good_release_is_left_alone_and_looked_at_every_two_seconds(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.create(clip="a")
    watching = guard(server, clip=GOOD)
    began = server.live_row.created_at.timestamp()
    for second in range(20):
        monkeypatch.setattr("serving.releases.auto_rollback.time.time", lambda now=began + second: now)
        assert await watching.step() is None
    assert server.broadcast.asked.count("observations") == 10
    told = watching.status()
    assert (told["state"], told["release"], told["incumbent"], told["kind"]) == ("guard", 2, 1, "release")
    assert told["compared"]["clip"]["agreed"] == 39
    assert told["seconds_left"] == SETTINGS.guard_seconds - 18


async def test_an_update_on_trial_is_promoted_when_it_was_watched_enough_and_an_operators_is_not(
    server: Server,
) -> None:
    await server.create(0.1, clip="b")
    age(server, 10_000)
    assert await guard(server, clip=GOOD).step() is None
    await server.back()
    server.propose()
    await server.step()
    assert await guard(server, clip=GOOD).step() is None  # too early
    age(server, 61)
    assert await guard(server, clip=ComparisonCounts(inputs=19, agreed=19)).step() is None  # too few
    server.ledger.hold("me", "wait")
    assert await guard(server, clip=GOOD).step() is None
    server.ledger.resume("me", "go")
    assert (await guard(server, clip=GOOD).step()) is not None
    assert server.live == (5, "a", None) and server.live_row.plain
    assert "39 of 40 inputs agree" in server.live_row.reason


async def test_what_is_watched_follows_from_the_ledger_alone(server: Server) -> None:
    now = time.time()
    assert find_guard_target(server.ledger, SETTINGS, now) is None  # the first release has no incumbent
    await server.create(clip="a")
    found = find_guard_target(server.ledger, SETTINGS, now)
    assert found is not None
    assert (found.release.number, found.incumbent.number) == (2, 1)
    assert (found.differs("clip"), found.differs("vlm")) == (True, False)
    assert find_guard_target(server.ledger, SETTINGS, now + SETTINGS.guard_seconds + 5) is None
    assert find_guard_target(server.ledger, SETTINGS.model_copy(update={"guard_seconds": 0.0}), time.time()) is None
    await server.create(clip="a")  # the same again: there is nothing to take back
    assert find_guard_target(server.ledger, SETTINGS, time.time()) is None
    await server.create(0.1, clip="b")
    assert find_guard_target(server.ledger, SETTINGS, now + 1e9) is not None  # a trial, for as long as it lasts
    await server.back()
    assert find_guard_target(server.ledger, SETTINGS, time.time()) is None
