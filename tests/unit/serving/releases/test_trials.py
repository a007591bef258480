from __future__ import annotations

import time
from datetime import timedelta

import numpy as np
import pytest
from scipy.stats import binom

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Ledger
from core.ledger import rows as t
from core.settings.serving import Rollout
from serving.releases.auto_rollback import Guard
from serving.releases.guard import (
    FALSE_ALARM,
    ComparisonCounts,
    Evidence,
    Guardrail,
    Observations,
    RequestCounts,
    broken,
    find_guard_target,
    look,
    look_number,
    together,
)
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


async def test_a_good_release_is_looked_at_every_two_seconds(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_an_update_on_trial_is_promoted_when_it_was_watched_enough_an_operators_not(server: Server) -> None:
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


DEFAULTS = Rollout()
LIVE, INCUMBENT = 7, 6


def first_alarm(
    seed: int, errors: float = 0.002, slower: float = 0.3, agrees: float = 0.95
) -> tuple[int, Guardrail] | None:
    """Look and guardrail of the first alarm in five minutes of traffic, at one look in two seconds."""
    random = np.random.default_rng(seed)

    def some(count: int, share: float) -> int:
        return int(random.binomial(count, share))

    requests = {LIVE: RequestCounts(), INCUMBENT: RequestCounts(5000, some(5000, 0.002))}
    seen = Observations(LIVE, requests, {"clip": ComparisonCounts()})
    for number in range(150):
        seen.requests[LIVE].add(RequestCounts(50, some(50, errors)))
        seen.compared["clip"].add(ComparisonCounts(3, some(3, agrees), 3, some(3, slower), 3))
        if bad := broken(look(DEFAULTS, seen, INCUMBENT, number + 1)):
            return number, bad[0].guardrail
    return None


def test_a_release_like_its_incumbent_is_never_taken_back_and_one_just_within_its_bounds_seldom() -> None:
    assert [seed for seed in range(60) if first_alarm(seed)] == []
    bounds = {"errors": 0.004, "slower": 0.5, "agrees": DEFAULTS.min_agreement}
    assert sum(first_alarm(seed, **bounds) is not None for seed in range(100, 160)) <= 60 * FALSE_ALARM + 4


@pytest.mark.parametrize(
    ("breach", "guardrail"),
    [({"errors": 0.2}, "errors"), ({"slower": 0.98}, "latency"), ({"agrees": 0.1}, "agreement")],
)
def test_each_breach_is_caught_within_thirty_seconds(breach: dict[str, float], guardrail: str) -> None:
    for seed in range(30):
        found = first_alarm(seed, **breach)
        assert found is not None and found[0] <= 15 and found[1] == guardrail, seed


def evidence(seen: Observations, guardrail: str, number: int = 6) -> Evidence:
    (found,) = [one for one in look(DEFAULTS, seen, INCUMBENT, number) if one.guardrail == guardrail]
    return found


def test_a_guardrail_allows_what_its_bound_and_the_incumbent_allow() -> None:
    def errs(requests: dict[int, RequestCounts]) -> bool:
        return evidence(Observations(LIVE, requests), "errors").broken

    def disagrees(agreed: int) -> bool:
        return evidence(Observations(LIVE, {}, {"vlm": ComparisonCounts(80, agreed)}), "agreement").broken

    assert not disagrees(32) and disagrees(0), "a VLM may change most answers about what it learned, but not all"
    assert not errs({LIVE: RequestCounts(1000, 15)}), "an incumbent that answered nothing yet is not held to be perfect"
    assert errs({LIVE: RequestCounts(60, 60)})
    outage = {LIVE: RequestCounts(400, 200), INCUMBENT: RequestCounts(4000, 2000)}
    assert not errs(outage), "an incumbent that fails as often excuses the release"
    assert errs(outage | {INCUMBENT: RequestCounts(4000, 20)})
    assert broken(look(DEFAULTS, Observations(LIVE), INCUMBENT, 1)) == [], "nothing was seen"
    assert broken(look(DEFAULTS, Observations(LIVE, {}, {"vlm": ComparisonCounts()}), INCUMBENT, 500_000)) == []


def test_failures_in_comparisons_count_for_a_shadow_that_answers_nobody() -> None:
    shadow = Observations(
        LIVE, {LIVE: RequestCounts(), INCUMBENT: RequestCounts(900, 0)}, {"vlm": ComparisonCounts(tried=40, failed=40)}
    )
    found = evidence(shadow, "errors")
    assert found.broken
    assert (found.bad, found.shown) == (40, "40 of 40 requests failed, 0 of 940 of release 6")


def test_the_chance_of_the_counts_is_that_of_a_binomial_at_the_bound() -> None:
    found = evidence(Observations(LIVE, {}, {"clip": ComparisonCounts(inputs=40, agreed=2)}), "agreement")
    assert (found.bad, found.of, found.allowed) == (38, 40, 0.3)
    assert found.chance == pytest.approx(binom.sf(37, 40, 0.3))
    assert found.shown == "2 of 40 inputs agree (5%), at least 70% must"


def test_each_look_spends_a_part_of_the_false_alarms_and_its_number_is_the_time_since_the_commit() -> None:
    assert [look_number(seconds) for seconds in (-1.0, 0.0, 1.9, 2.0, 20.0)] == [1, 1, 1, 2, 11]
    levels = [evidence(Observations(LIVE), "errors", number).level for number in range(1, 5001)]
    assert levels == sorted(levels, reverse=True)
    assert sum(levels) * 5 <= FALSE_ALARM


def test_processes_add_up_and_comparisons_of_another_release_do_not_count() -> None:
    ours = Observations(LIVE, {LIVE: RequestCounts(3, 1)}, {"clip": ComparisonCounts(2, 1)})
    late = Observations(
        INCUMBENT, {INCUMBENT: RequestCounts(5, 0), LIVE: RequestCounts(1, 0)}, {"clip": ComparisonCounts(9, 9)}
    )
    total = together(LIVE, [ours, late, ours])
    assert (total.requests[LIVE], total.requests[INCUMBENT]) == (RequestCounts(7, 2), RequestCounts(5, 0))
    assert (total.compared["clip"].inputs, total.compared["clip"].agreed) == (4, 2)
