from __future__ import annotations

from datetime import timedelta
from typing import Any

from core.ledger import DeletionRow, Ledger
from core.ledger import rows as t
from core.ledger.events import EVENT_TYPES
from tests.support.pages import ROOT, Page
from tests.unit.core.ledger.steps import race

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


def test_they_are_listed_by_age_and_state_and_counted(ledger: Ledger) -> None:
    for number, name in enumerate(["a", "tombstone t:0:1", "tombstone t:0:2", "b_"]):
        ask(ledger, name)
        with ledger.database.write() as session:
            session.get_one(t.DeletionRow, name).requested_at -= timedelta(hours=number)
    removed(ledger, "a")
    assert [row.id for row in ledger.deletions()] == ["a", "tombstone t:0:1", "tombstone t:0:2", "b_"]
    assert [row.id for row in ledger.deletions(2, oldest_first=True)] == ["b_", "tombstone t:0:2"]
    assert [row.id for row in ledger.deletions(states=["removed"])] == ["a"]
    assert ledger.count_deletions("tombstone ") == 2 and ledger.count_deletions("b%") == 0
    assert ledger.count_deletions(states=["requested", "removed"]) == 4 and ledger.count_deletions() == 4
    assert ledger.deletion_ids("tombstone ") == {"tombstone t:0:1", "tombstone t:0:2"}
    oldest = ledger.oldest_deletion()
    assert oldest is not None and oldest.id == "b_"
    ledger.deletion_done("b_")
    ledger.deletion_done("tombstone t:0:2")
    oldest = ledger.oldest_deletion()
    assert oldest is not None and oldest.id == "tombstone t:0:1"
