from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update

from core.errors import LeaseLost, LedgerError, ReleaseConflict
from core.ledger import DeletionRow, Ledger
from core.ledger import rows as t
from core.ledger.events import EVENT_TYPES, MAX_DATA_BYTES
from core.ledger.leases import check_lease
from tests.support.pages import ROOT, Page
from tests.unit.core.ledger.steps import begin, race, release


def events(ledger: Ledger) -> dict[str, dict[str, Any]]:
    return {row.event_id: row.data for row in reversed(ledger.events())}


def test_the_way_of_an_update_into_service_and_back_is_told_with_the_fields_of_the_page(ledger: Ledger) -> None:
    ledger.register_adapter("clip-a", "clip", "base", "space-i", "space-t", {})
    begin(ledger)
    ledger.advance_update("u1", "trained", adapter="clip-a")
    ledger.advance_update("u1", "gated")
    ledger.record_verdict("u1", "clip-a", "passed", "reports/u1", {"reasons": ["all suites pass"]})
    row = ledger.propose("update", clip="clip-a", actor="updater", reason="passed", update_id="u1")
    ledger.advance_proposal(row.id, "preparing")
    release(ledger, "clip-a", proposal=row.id)
    found = events(ledger)
    assert list(found) == [
        "candidate-u1", "verdict-u1", "proposal-1-pending", "proposal-1-preparing", "release-1",
        "proposal-1-committed",
    ]  # fmt: skip
    assert found["candidate-u1"] == {
        "update": "u1", "adapter": "clip-a", "family": "clip", "data_from": {"t:0": 0}, "data_to": {"t:0": 10},
        "trigger": None,
    }  # fmt: skip
    assert found["verdict-u1"] == {
        "update": "u1", "adapter": "clip-a", "outcome": "passed", "reasons": ["all suites pass"],
    }  # fmt: skip
    assert found["release-1"] == {
        "number": 1, "clip": "clip-a", "vlm": None, "previous": None, "image_space": "space-i", "actor": "ann",
        "reason": "because", "share": 1.0,
    }  # fmt: skip
    assert (found["proposal-1-committed"]["release"], found["proposal-1-committed"]["state"]) == (1, "committed")
    for clip in ("clip-b", None):
        release(ledger, clip)
    back = ledger.propose("rollback", family="both", clip="clip-a", actor="bob", reason="bad")
    release(ledger, "clip-a", proposal=back.id)
    found = events(ledger)
    assert found["rollback-4"] == {"number": 4, "to": 1, "actor": "ann", "reason": "because"}
    assert (found["release-4"]["clip"], found["release-4"]["previous"]) == ("clip-a", 3)
    prose = Page(ROOT / "docs" / "events.md").prose
    lines = {line.split("`")[1]: line for line in prose.splitlines() if line.startswith("| `ratchet.")}
    assert set(lines) == set(EVENT_TYPES.values())
    seen = {event.type: event for event in ledger.events()}
    assert len(seen) == 5
    for kind, event in seen.items():
        assert all(f"`{name}`" in lines[kind] for name in event.data), kind
        assert event.event_id.split("-")[0] == kind.split(".")[1] and f"`{event.event_id.split('-')[0]}-" in lines[kind]


def test_what_is_repeated_after_a_crash_is_told_once_and_what_fails_not_at_all(ledger: Ledger) -> None:
    begin(ledger)
    for _ in range(2):
        ledger.advance_update("u1", "trained", adapter="clip-a")
        ledger.record_verdict("u1", "clip-a", "passed", "reports/u1", {})
        row = ledger.propose("update", clip="clip-a", actor="updater", reason="passed", update_id="u1")
        ledger.advance_proposal(row.id, "preparing")
    assert len(ledger.events()) == 4
    with pytest.raises(ReleaseConflict):
        release(ledger, "clip-a", proposal=row.id, number=3)
    assert len(ledger.events()) == 4, "a release that fails tells nothing"


def test_a_fact_whose_event_cannot_be_written_is_not_written(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the disk is full")

    begin(ledger)
    row = ledger.propose("release", clip="clip-a", actor="ann", reason="r")
    for module in ("learning", "events"):
        monkeypatch.setattr(f"core.ledger.{module}.add_event", broken)
    attempts: list[Callable[[], object]] = [
        lambda: release(ledger, None, proposal=row.id),
        lambda: ledger.propose("release", clip="clip-b", actor="ann", reason="r"),
        lambda: ledger.advance_proposal(row.id, "failed", "no"),
        lambda: ledger.advance_update("u1", "trained", adapter="clip-a"),
        lambda: ledger.record_verdict("u1", "clip-a", "passed", "key", {}),
    ]
    for attempt in attempts:
        with pytest.raises(RuntimeError):
            attempt()
    assert ledger.live() is None and ledger.update("u1").adapter is None and ledger.verdict_of("u1") is None
    assert [each.state for each in ledger.proposals()] == ["pending"]
    assert list(events(ledger)) == [f"proposal-{row.id}-pending"]


def test_an_event_with_a_known_id_is_recorded_once_also_by_many_at_once(ledger: Ledger) -> None:
    written = race(*[lambda: ledger.record_event("ratchet.gap.v1", "gap-t-0-5", "t:0", {})] * 6)
    assert sorted(written) == [False] * 5 + [True]
    assert len(ledger.events()) == 1


@pytest.mark.parametrize(
    ("event", "names"),
    [
        (("ratchet.other.v1", "x", "s", {}), "type"),
        (("ratchet.gap.v1", "", "s", {}), "id"),
        (("ratchet.gap.v1", "x", "s" * 301, {}), "subject"),
        (("ratchet.gap.v1", "x", "s", {"a": object()}), "not JSON"),
        (("ratchet.gap.v1", "x", "s", {"a": float("nan")}), "not JSON"),
        (("ratchet.gap.v1", "x", "s", {"a": "b" * MAX_DATA_BYTES}), "bytes"),
    ],
)
def test_an_event_that_could_not_be_published_is_refused(ledger: Ledger, event: Any, names: str) -> None:
    with pytest.raises(LedgerError, match=names):
        ledger.record_event(*event)
    assert ledger.events() == []


def test_published_events_wait_no_more_and_are_removed_later_and_the_lease_is_checked(ledger: Ledger) -> None:
    for name, kind in (("old", "release"), ("new", "release"), ("lost", "gap"), ("waits", "release")):
        ledger.record_event(EVENT_TYPES[kind], name, name, {})
    slept = ledger.acquire_lease("events", "a", seconds=0)
    epoch = ledger.acquire_lease("events", "b", 60)
    assert slept is not None and epoch == slept + 1
    ids = {row.event_id: row.id for row in ledger.events()}
    published = {ids["old"]: (0, 2**40), ids["new"]: (1, 7), ids["lost"]: (0, 1)}
    with pytest.raises(LeaseLost, match="b"):
        ledger.mark_published(published, lease="events", epoch=slept)
    assert ledger.count_waiting_events() == 4
    ledger.mark_published(published, lease="events", epoch=epoch)
    assert [row.id for row in ledger.waiting_events()] == [ids["waits"]] and ledger.count_waiting_events() == 1
    places = [(row.partition, row.offset) for row in reversed(ledger.events())]
    assert places == [*published.values(), (None, None)]
    now = datetime.now(UTC)
    with ledger.database.write() as session:
        aged = update(t.EventRow).where(t.EventRow.event_id.in_(["old", "waits", "lost"]))
        session.execute(aged.values(time=now - timedelta(days=8)))
    assert ledger.prune_events(now - timedelta(days=7)) == 1
    assert set(events(ledger)) == {"waits", "new", "lost"}
    assert not ledger.record_event(EVENT_TYPES["gap"], "lost", "lost", {}), "a gap is told once"
    assert ledger.prune_events(now - timedelta(days=7)) == 0


def test_a_lease_has_one_holder_until_it_runs_out_or_is_given_back(ledger: Ledger) -> None:
    first = ledger.acquire_lease("job", "a", 60)
    assert first == 1 and ledger.acquire_lease("job", "a", 60) == 1
    assert ledger.acquire_lease("job", "b", 60) is None
    assert ledger.acquire_lease("another job", "b", 60) == 1
    assert ledger.renew_lease("job", first, seconds=0)
    second = ledger.acquire_lease("job", "b", 60)
    assert second == 2
    assert not ledger.renew_lease("job", first, 60)
    ledger.release_lease("job", first)
    assert (row := ledger.lease("job")) is not None and row.holder == "b"
    ledger.release_lease("job", second)
    assert ledger.acquire_lease("job", "b", 60) == 3
    takes = [lambda name=name: ledger.acquire_lease("raced", name, 60) for name in "abcde"]  # type: ignore[misc]
    assert sorted(race(*takes), key=str) == [1, None, None, None, None]


def test_a_lease_is_not_taken_while_a_write_under_it_goes_on(ledger: Ledger) -> None:
    ledger.record_event("ratchet.gap.v1", "gap-0", "t:0", {})
    epoch = ledger.acquire_lease("events", "a", seconds=0)
    assert epoch is not None
    taken: list[int | None] = []
    taker = threading.Thread(target=lambda: taken.append(ledger.acquire_lease("events", "b", 60)))
    with ledger.database.write() as session:
        check_lease(session, "events", epoch)
        taker.start()
        session.get_one(t.EventRow, 1).published = True
        taker.join(0.3)
        assert taken == []
    taker.join(30)
    assert taken == [epoch + 1] and ledger.count_waiting_events() == 0


SELECTOR = {"source": "cam", "before": "2026-01-01"}


def ask(ledger: Ledger, name: str = "d1", **fields: Any) -> DeletionRow:
    return ledger.request_deletion(name, SELECTOR, **{"actor": "ann", "reason": "asked to", **fields})


def removed(ledger: Ledger, name: str = "d1", samples: int = 2, version: int = 7) -> None:
    adapters = {"learned": ["clip-a"], "may_have_replayed": []}
    ledger.deletion_removed(name, samples=samples, refusals=1, adapters=adapters, store_version=version)


def found(ledger: Ledger, name: str = "d1") -> DeletionRow:
    row = ledger.deletion(name)
    assert row is not None
    return row


def test_a_request_is_recorded_once_and_goes_from_requested_to_removed_to_done_and_not_back(ledger: Ledger) -> None:
    first = ask(ledger)
    assert (first.state, first.selector, first.actor, first.reason) == ("requested", SELECTOR, "ann", "asked to")
    assert (first.samples, first.version, first.removed_at, first.done_at) == (0, None, None, None)
    assert ask(ledger, actor="bob", reason="again") == first
    [row] = ledger.audit_rows()
    assert (row.actor, row.action, row.subject) == ("ann", "delete", "deletion d1")
    assert row.detail == {"reason": "asked to", "selector": SELECTOR}
    assert ledger.deletion("d2") is None
    removed(ledger)
    then = found(ledger)
    assert (then.state, then.samples, then.refusals, then.removed_version) == ("removed", 2, 1, 7)
    assert then.adapters["learned"] == ["clip-a"] and then.removed_at is not None and then.version is None
    ledger.deletions_rewritten(["d1", "unknown"], 9)
    ledger.deletions_rewritten(["d1"], 12)
    assert found(ledger).version == 9, "the first version that has it no more"
    ledger.deletion_reopened("d1")
    assert found(ledger).version is None, "what is found later has to be written out again"
    removed(ledger, samples=3, version=13)
    again = found(ledger)
    assert (again.samples, again.removed_version, again.removed_at) == (3, 13, then.removed_at)
    ledger.deletions_rewritten(["d1"], 14)
    ledger.deletion_done("d1")
    done = found(ledger)
    assert (done.state, done.version) == ("done", 14) and done.done_at is not None
    removed(ledger, samples=5)
    ledger.deletion_reopened("d1")
    ledger.deletions_rewritten(["d1"], 20)
    assert found(ledger) == done


def test_its_end_is_an_audit_row_and_an_event_and_both_once(ledger: Ledger) -> None:
    ask(ledger)
    removed(ledger)
    assert race(*[lambda: ledger.deletion_done("d1")] * 4) == [None] * 4
    [event] = ledger.events()
    assert (event.type, event.event_id, event.subject) == (EVENT_TYPES["deletion"], "deletion-d1", "deletion d1")
    expected = {
        "selector": SELECTOR, "samples": 2, "refusals": 1, "actor": "ann", "reason": "asked to",
        "adapters": {"learned": ["clip-a"], "may_have_replayed": []}, "remains": None,
    }  # fmt: skip
    assert event.data == expected
    assert [(row.actor, row.action, row.detail) for row in ledger.audit_rows(1)] == [("maintain", "deleted", expected)]
    assert len(ledger.audit_rows()) == 2
    lines = Page(ROOT / "docs" / "events.md").prose.splitlines()
    [line] = [each for each in lines if "`ratchet.deletion.v1`" in each[:30]]
    assert all(f"`{name}`" in line for name in event.data)
    for offset in range(3):  # names of which an event's ID holds only a part
        name = f"tombstone {'t' * 249}:0:{offset}"
        ask(ledger, name)
        removed(ledger, name)
        ledger.deletion_done(name)
    assert len({each.event_id for each in ledger.events()}) == 4


def test_an_update_lists_what_was_carried_out_before_its_version_and_each_is_listed_once(ledger: Ledger) -> None:
    for name in ("early", "late", "asked"):
        ask(ledger, name)
    removed(ledger, "early", version=7)
    removed(ledger, "late", version=20)
    assert [row.id for row in ledger.list_deletions_in("u1", 10)] == ["early"]
    assert [row.id for row in ledger.list_deletions_in("u1", 10)] == ["early"], "asked again, as after a crash"
    assert [row.id for row in ledger.list_deletions_in("u2", 30)] == ["late"]
    assert [found(ledger, name).update_id for name in ("early", "late", "asked")] == ["u1", "u2", None]


def test_deletions_are_listed_by_age_and_state_and_counted_by_name(ledger: Ledger) -> None:
    for number, name in enumerate(["a", "tombstone t:0:1", "b_"]):
        ask(ledger, name)
        with ledger.database.write() as session:
            session.get_one(t.DeletionRow, name).requested_at -= timedelta(hours=number)
    removed(ledger, "a")
    assert [row.id for row in ledger.deletions()] == ["a", "tombstone t:0:1", "b_"]
    assert [row.id for row in ledger.deletions(2, oldest_first=True)] == ["b_", "tombstone t:0:1"]
    assert [row.id for row in ledger.deletions(states=["removed"])] == ["a"]
    assert ledger.count_deletions("tombstone ") == 1 and ledger.count_deletions("b%") == 0
    assert ledger.count_deletions(states=["requested", "removed"]) == ledger.count_deletions() == 3
    assert ledger.deletion_ids("tombstone ") == {"tombstone t:0:1"}
    for oldest in ("b_", "tombstone t:0:1"):
        assert (row := ledger.oldest_deletion()) is not None and row.id == oldest
        ledger.deletion_done(oldest)
