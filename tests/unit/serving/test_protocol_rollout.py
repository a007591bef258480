"""Canaries, shadows, promotions and the guard, without Ray: replicas that are plain objects, and a real ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Family, Ledger
from core.ledger import tables as t
from core.ledger.rows import ReleaseRow
from core.settings.serving import Rollout
from serving.releases.commands import PromoteCommand, ReleaseCommand, RollbackCommand
from serving.releases.guard import find_guard_target
from serving.releases.observations import ComparisonCounts, Observations, RequestCounts
from serving.releases.protocol import ReleaseProtocol
from serving.releases.residency import read_residency
from serving.releases.rollout_controller import RolloutController
from serving.releases.types import ReleaseResult
from tests.unit.serving.test_protocol import PlainBroadcast

SETTINGS = Rollout(observe_seconds=60, min_comparisons=20)
GOOD, BAD = (
    ComparisonCounts(inputs=40, agreed=39, timed=40, tried=40),
    ComparisonCounts(inputs=40, agreed=2, timed=40, tried=40),
)


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
    made = ReleaseProtocol(ledger, broadcast, window=2, update_share=0.1)
    await made.start()
    return made


async def release(protocol: ReleaseProtocol, share: float = 1.0, **adapters: str | None) -> ReleaseResult:
    named: dict[Family, str | None] = {family: adapters[family] for family in ("clip", "vlm") if family in adapters}
    return await protocol.release(
        ReleaseCommand(adapters=named, actor="me", reason="test", expected_live=live(protocol)[0], share=share)
    )


def live_row(protocol: ReleaseProtocol) -> ReleaseRow:
    row = protocol.ledger.live()
    assert row is not None
    return row


def live(protocol: ReleaseProtocol) -> tuple[int, str | None, str | None, float]:
    row = protocol.ledger.live()
    assert row is not None
    return row.number, row.clip, row.vlm, row.share


async def back(protocol: ReleaseProtocol, family: Family | None = None, to: int | None = None) -> ReleaseResult:
    return await protocol.rollback(
        RollbackCommand(actor="me", reason="bad", expected_live=live(protocol)[0], family=family, to=to)
    )


def rollout(protocol: ReleaseProtocol, **compared: ComparisonCounts) -> RolloutController:
    """A guard whose ingress saw this of the live release."""

    async def observe() -> list[Observations]:
        number = live(protocol)[0]
        return [Observations(number, {number: RequestCounts(50)}, dict(compared))]  # type: ignore[arg-type]

    return RolloutController(protocol.ledger, protocol, SETTINGS, observe)


def age(ledger: Ledger, seconds: float) -> None:
    """Let every release be older than it is."""
    with ledger.database.write() as session:
        for row in session.query(t.Release):
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


async def test_a_restart_during_a_canary_goes_on_with_both_sides(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    await release(protocol, clip="a")
    await release(protocol, 0.1, clip="b")
    broadcast = PlainBroadcast()
    assert await ReleaseProtocol(ledger, broadcast, window=2).start() is None
    assert broadcast.windows == [[3, 2]]


async def test_nothing_is_announced_when_one_side_of_a_canary_cannot_be_served(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    await release(protocol, clip="a")
    await release(protocol, 0.1, clip="b")
    with pytest.raises(ReleaseError, match="a cannot be served: gone"):
        await ReleaseProtocol(ledger, PlainBroadcast(broken={"a": "gone"}), window=2).start()


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


async def test_a_canary_is_taken_back_to_what_answers_beside_it(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    await release(protocol, vlm="v")
    await release(protocol, 0.1, clip="b")
    await back(protocol)
    assert live(protocol) == (5, "a", "v", 1.0)
    await release(protocol, 0.1, vlm="w")
    await back(protocol, "vlm")
    assert live(protocol) == (7, "a", "v", 1.0)


async def test_a_rollback_never_goes_to_what_was_only_on_trial_or_was_withdrawn(protocol: ReleaseProtocol) -> None:
    await release(protocol, 0.1, clip="a")
    await back(protocol)
    with pytest.raises(ReleaseError, match="no release before 3 has another"):
        await back(protocol)
    await release(protocol, clip="b")
    await release(protocol, clip="c")
    protocol.ledger.withdraw(["b"], actor="guard", subject="release 4", reason="disagrees", evidence={})
    await back(protocol)
    assert live(protocol)[:2] == (6, None)
    with pytest.raises(ReleaseError, match=r"b was withdrawn: disagrees .*--force"):
        await back(protocol, to=4)


async def test_a_release_of_the_other_model_ends_a_trial_without_promoting_it(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    await release(protocol, 0.1, clip="b")
    await release(protocol, vlm="v")
    assert live(protocol) == (4, "a", "v", 1.0)


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
    guard = rollout(protocol, clip=BAD)
    made = await guard.step()
    assert made is not None
    assert (made.kind, live(protocol)) == ("rollback", (4, "a", "v", 1.0))
    row = next(row for row in ledger.audit_rows() if row.action == "withdraw")
    assert (row.actor, row.subject, row.detail["adapters"], row.detail["back_to"]) == ("guard", "release 3", ["b"], 2)
    assert row.detail["compared"]["clip"]["inputs"] == 40
    broken = [one["guardrail"] for one in row.detail["guardrails"] if one["broken"]]
    assert broken == ["agreement"]
    assert ledger.live().reason == row.detail["reason"]  # type: ignore[union-attr]
    assert await guard.step() is None  # a rollback is not guarded: nothing flaps
    assert guard.status() == {"state": "idle"}
    assert live(protocol)[0] == 4


async def test_the_guard_goes_back_to_the_stable_release_from_a_canary_also_while_held(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    await release(protocol, clip="a")
    await release(protocol, 0.1, clip="b")
    ledger.hold("me", "quiet")
    assert (await rollout(protocol, clip=BAD).step()) is not None
    assert live(protocol) == (4, "a", None, 1.0)


async def test_a_good_release_is_left_alone_and_its_status_shows_what_was_seen(protocol: ReleaseProtocol) -> None:
    await release(protocol, clip="a")
    guard = rollout(protocol, clip=GOOD)
    assert await guard.step() is None
    told = guard.status()
    assert (told["state"], told["release"], told["incumbent"], told["kind"]) == ("guard", 2, 1, "release")
    assert told["compared"]["clip"]["agreed"] == 39
    assert 0 < told["seconds_left"] <= SETTINGS.guard_seconds


async def test_an_update_on_trial_is_promoted_when_it_was_watched_long_and_often_enough(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    ledger.propose("update", clip="a", actor="updater", reason="passed")
    await protocol.step()
    assert await rollout(protocol, clip=GOOD).step() is None  # too early
    age(ledger, 61)
    assert await rollout(protocol, clip=ComparisonCounts(inputs=19, agreed=19)).step() is None  # too few
    ledger.hold("me", "wait")
    assert await rollout(protocol, clip=GOOD).step() is None
    ledger.resume("me", "go")
    assert (await rollout(protocol, clip=GOOD).step()) is not None
    assert live(protocol) == (3, "a", None, 1.0)
    assert "39 of 40 inputs agree" in ledger.live().reason  # type: ignore[union-attr]


async def test_a_trial_of_an_operator_is_theirs_to_promote(protocol: ReleaseProtocol, ledger: Ledger) -> None:
    await release(protocol, 0.1, clip="a")
    age(ledger, 10_000)
    assert await rollout(protocol, clip=GOOD).step() is None
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


async def test_the_guard_goes_back_to_its_incumbent_though_that_was_withdrawn_once(
    protocol: ReleaseProtocol, ledger: Ledger
) -> None:
    ledger.withdraw(["a"], actor="guard", subject="release 9", reason="disagrees", evidence={})
    await release(protocol, clip="a")  # an operator insisted
    await release(protocol, clip="b")
    assert (await rollout(protocol, clip=BAD).step()) is not None
    assert live(protocol) == (4, "a", None, 1.0)


@pytest.mark.parametrize(("share", "kind"), [(0.0, "shadow"), (0.1, "canary")])
async def test_a_rollback_to_a_trial_that_was_never_promoted_is_refused(
    protocol: ReleaseProtocol, share: float, kind: str
) -> None:
    await release(protocol, share, clip="a")
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


async def test_the_guard_looks_once_for_each_part_of_the_false_alarms_that_it_spends(
    protocol: ReleaseProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    await release(protocol, clip="a")
    observed = 0
    guard = rollout(protocol, clip=GOOD)
    observe = guard._observe

    async def counting() -> Sequence[Observations]:
        nonlocal observed
        observed += 1
        return await observe()

    guard._observe = counting
    began = live_row(protocol).created_at.timestamp()
    for second in range(20):
        monkeypatch.setattr("serving.releases.rollout_controller.time.time", lambda now=began + second: now)
        await guard.step()
    assert observed == 10
