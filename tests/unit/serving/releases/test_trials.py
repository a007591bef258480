"""Canaries, shadows, promotions and the guard, without Ray."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Ledger
from core.ledger import rows as t
from core.settings.serving import Rollout
from serving.releases.auto_rollback import Guard
from serving.releases.guard import ComparisonCounts, Observations, RequestCounts, find_guard_target
from serving.releases.protocol import ReleaseProtocol
from serving.releases.residency import read_residency
from serving.releases.types import PromoteCommand
from tests.unit.serving.releases.plain_replicas import PlainBroadcast, back, live, live_row, release

SETTINGS = Rollout(observe_seconds=60, min_comparisons=20)
GOOD, BAD = (
    ComparisonCounts(inputs=40, agreed=39, timed=40, tried=40),
    ComparisonCounts(inputs=40, agreed=2, timed=40, tried=40),
)


@pytest.fixture
async def protocol(ledger: Ledger, broadcast: Any) -> ReleaseProtocol:
    made = ReleaseProtocol(ledger, broadcast, window=2, update_share=0.1)
    await made.start()
    return made


def guard(protocol: ReleaseProtocol, **compared: ComparisonCounts) -> Guard:
    """A guard whose ingress saw this of the live release."""
    number, replicas, counts = live(protocol)[0], protocol.broadcast, compared
    replicas.seen = [Observations(number, {number: RequestCounts(50)}, counts)]  # type: ignore[attr-defined, arg-type]
    return Guard(protocol, SETTINGS)


def age(ledger: Ledger, seconds: float) -> None:
    """Let every release be older than it is."""
    with ledger.database.write() as session:
        for row in session.query(t.ReleaseRow):
            row.created_at -= timedelta(seconds=seconds)


async def test_a_canary_leaves_the_stable_release_resident_whatever_the_window(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, clip="a")
    for share in (0.0, 0.1, 0.5):
        await release(protocol, share, clip="b")
    assert broadcast.windows[-1] == [5, 2]
    rows = read_residency(protocol.ledger, 2)
    assert [(row.number, row.share) for row in rows.answering] == [(5, 0.5), (2, 1.0)]
    assert rows.clips == ("b", "a")


async def test_a_restart_during_a_canary_needs_both_sides(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    await release(protocol, clip="a")
    await release(protocol, 0.1, clip="b")
    whole: Any = PlainBroadcast()
    broken: Any = PlainBroadcast(broken={"a": "gone"})
    assert await ReleaseProtocol(ledger, whole, window=2).start() is None
    assert whole.windows == [[3, 2]]
    with pytest.raises(ReleaseError, match="a cannot be served: gone"):
        await ReleaseProtocol(ledger, broken, window=2).start()


async def test_a_promotion_is_a_plain_release_of_the_same_adapters_without_preparation(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast
) -> None:
    await release(protocol, 0.1, clip="a", vlm="v")
    prepared = (list(broadcast.prepared), list(broadcast.prepared_vlm))
    made = await protocol.promote(PromoteCommand(actor="me", reason="fine", expected_live=2))
    assert live(protocol) == (3, "a", "v", 1.0)
    assert (made.kind, made.share) == ("promotion", 1.0)
    assert (broadcast.prepared, broadcast.prepared_vlm) == prepared
    assert broadcast.windows[-1] == [3, 1]
    with pytest.raises(ReleaseError, match="nothing can be promoted"):
        await protocol.promote(PromoteCommand(actor="me", reason="again", expected_live=3))


async def test_a_promotion_of_what_is_not_live_any_more_conflicts(protocol: ReleaseProtocol) -> None:
    await release(protocol, 0.1, clip="a")
    await release(protocol, 0.1, clip="b")
    with pytest.raises(ReleaseConflict):
        await protocol.promote(PromoteCommand(actor="me", reason="late", expected_live=2))


async def test_a_canary_is_taken_back_to_what_answers_next_to_it(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    await release(protocol, vlm="v")
    await release(protocol, 0.1, clip="b")
    await back(protocol)
    assert live(protocol) == (5, "a", "v", 1.0)
    await release(protocol, 0.1, vlm="w")
    await back(protocol, "vlm")
    assert live(protocol) == (7, "a", "v", 1.0)


async def test_a_release_of_the_other_model_ends_a_trial_without_promoting_it(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    await release(protocol, 0.1, clip="b")
    await release(protocol, vlm="v")
    assert live(protocol) == (4, "a", "v", 1.0)


@pytest.mark.parametrize(("share", "kind"), [(0.0, "shadow"), (0.1, "canary")])
async def test_a_rollback_never_goes_to_what_was_only_on_trial(
    protocol: ReleaseProtocol, share: float, kind: str
) -> None:
    await release(protocol, share, clip="a")
    await back(protocol)
    with pytest.raises(ReleaseError, match="no release before 3 has another"):
        await back(protocol)
    with pytest.raises(ReleaseError, match=f"was a {kind} that was never promoted: a never answered all"):
        await back(protocol, to=2)
    assert live(protocol)[0] == 3


async def test_a_rollback_to_a_trial_that_was_promoted_later_is_one_to_what_was_promoted(
    protocol: ReleaseProtocol,
) -> None:
    await release(protocol, 0.1, clip="a")
    await protocol.promote(PromoteCommand(actor="me", reason="fine", expected_live=2))
    await release(protocol, clip="b")
    await back(protocol, to=2)
    assert live(protocol) == (5, "a", None, 1.0)


async def test_a_rollback_never_goes_to_what_was_withdrawn(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    await release(protocol, clip="b")
    await release(protocol, clip="c")
    ledger.withdraw(["b"], actor="guard", subject="release 2", reason="disagrees", evidence={})
    await back(protocol)
    assert live(protocol)[:2] == (4, None)
    with pytest.raises(ReleaseError, match=r"b was withdrawn: disagrees .*--force"):
        await back(protocol, to=2)


async def test_an_update_is_a_canary_by_the_settings_and_the_next_one_waits_for_its_end(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    for name in ("a", "b"):
        ledger.propose("update", clip=name, actor="updater", reason="passed")
    await protocol.step()
    assert live(protocol) == (2, "a", None, 0.1)
    assert await protocol.step() is None
    await protocol.promote(PromoteCommand(actor="me", reason="fine", expected_live=2))
    await protocol.step()
    assert live(protocol) == (4, "b", None, 0.1)
    assert ledger.stable() == ledger.release(3)


async def test_an_update_that_makes_a_withdrawn_adapter_again_fails(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    ledger.withdraw(["a"], actor="guard", subject="release 9", reason="disagrees", evidence={})
    ledger.propose("update", clip="a", actor="updater", reason="passed")
    with pytest.raises(ReleaseError, match="a was withdrawn: disagrees"):
        await protocol.step()
    assert ledger.proposals(1)[0].state == "failed"
    assert live(protocol)[0] == 1


async def test_the_guard_takes_a_bad_release_back_once_and_says_why(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    await release(protocol, clip="a", vlm="v")
    await release(protocol, clip="b")
    watching = guard(protocol, clip=BAD)
    made = await watching.step()
    assert made is not None
    assert (made.kind, live(protocol)) == ("rollback", (4, "a", "v", 1.0))
    row = next(row for row in ledger.audit_rows() if row.action == "withdraw")
    assert (row.actor, row.subject, row.detail["adapters"], row.detail["back_to"]) == ("guard", "release 3", ["b"], 2)
    assert row.detail["compared"]["clip"]["inputs"] == 40
    assert [one["guardrail"] for one in row.detail["guardrails"] if one["broken"]] == ["agreement"]
    assert live_row(protocol).reason == row.detail["reason"]
    assert await watching.step() is None  # a rollback is not guarded: nothing flaps
    assert watching.status() == {"state": "idle"}
    assert live(protocol)[0] == 4


async def test_the_guard_goes_back_to_the_stable_release_from_a_canary_also_while_held(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    await release(protocol, clip="a")
    await release(protocol, 0.1, clip="b")
    ledger.hold("me", "quiet")
    assert (await guard(protocol, clip=BAD).step()) is not None
    assert live(protocol) == (4, "a", None, 1.0)


async def test_the_guard_goes_back_to_its_incumbent_though_that_was_withdrawn_once(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    ledger.withdraw(["a"], actor="guard", subject="release 9", reason="disagrees", evidence={})
    await release(protocol, clip="a")  # an operator insisted
    await release(protocol, clip="b")
    assert (await guard(protocol, clip=BAD).step()) is not None
    assert live(protocol) == (4, "a", None, 1.0)


async def test_a_good_release_is_left_alone_and_its_status_shows_what_was_seen(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    watching = guard(protocol, clip=GOOD)
    assert await watching.step() is None
    told = watching.status()
    assert (told["state"], told["release"], told["incumbent"], told["kind"]) == ("guard", 2, 1, "release")
    assert told["compared"]["clip"]["agreed"] == 39
    assert 0 < told["seconds_left"] <= SETTINGS.guard_seconds


async def test_an_update_on_trial_is_promoted_when_it_was_watched_long_and_often_enough(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    ledger.propose("update", clip="a", actor="updater", reason="passed")
    await protocol.step()
    assert await guard(protocol, clip=GOOD).step() is None  # too early
    age(ledger, 61)
    assert await guard(protocol, clip=ComparisonCounts(inputs=19, agreed=19)).step() is None  # too few
    ledger.hold("me", "wait")
    assert await guard(protocol, clip=GOOD).step() is None
    ledger.resume("me", "go")
    assert (await guard(protocol, clip=GOOD).step()) is not None
    assert live(protocol) == (3, "a", None, 1.0)
    assert "39 of 40 inputs agree" in live_row(protocol).reason


async def test_a_trial_of_an_operator_is_theirs_to_promote(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    await release(protocol, 0.1, clip="a")
    age(ledger, 10_000)
    assert await guard(protocol, clip=GOOD).step() is None
    assert live(protocol)[3] == 0.1


async def test_what_is_watched_follows_from_the_ledger_alone(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    now = time.time()
    assert find_guard_target(ledger, SETTINGS, now) is None  # the first release has no incumbent
    await release(protocol, clip="a")
    found = find_guard_target(ledger, SETTINGS, now)
    assert found is not None
    assert (found.release.number, found.incumbent.number) == (2, 1)
    assert (found.differs("clip"), found.differs("vlm")) == (True, False)
    assert find_guard_target(ledger, SETTINGS, now + SETTINGS.guard_seconds + 5) is None
    assert find_guard_target(ledger, SETTINGS.model_copy(update={"guard_seconds": 0.0}), time.time()) is None
    await release(protocol, clip="a")  # the same again: there is nothing to take back
    assert find_guard_target(ledger, SETTINGS, time.time()) is None
    await release(protocol, 0.1, clip="b")
    assert find_guard_target(ledger, SETTINGS, now + 1e9) is not None  # a trial, for as long as it lasts
    await back(protocol)
    assert find_guard_target(ledger, SETTINGS, time.time()) is None


async def test_the_guard_looks_once_for_each_part_of_the_false_alarms_that_it_spends(
    protocol: ReleaseProtocol, broadcast: PlainBroadcast, monkeypatch: pytest.MonkeyPatch
) -> None:
    await release(protocol, clip="a")
    watching = guard(protocol, clip=GOOD)
    began = live_row(protocol).created_at.timestamp()
    for second in range(20):
        monkeypatch.setattr("serving.releases.auto_rollback.time.time", lambda now=began + second: now)
        await watching.step()
    assert broadcast.asked.count("observations") == 10
