"""The console lists deletions, and shows the receipt of each."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from core.ledger import Ledger
from streams.store.deletion import request_deletion
from tests.support.story import EVIL

TOMBSTONE = "tombstone shop.samples:1:17"


def test_nothing_was_deleted_is_said_and_the_audit_log_leads_there(visitor: TestClient) -> None:
    assert "Nothing here" in visitor.get("/audit/deletions").text
    assert 'href="/audit/deletions"' in visitor.get("/audit").text


def test_each_deletion_is_listed_with_who_when_what_why_and_how_much(visitor: TestClient, ledger: Ledger) -> None:
    waits = request_deletion(ledger, {"source": "crawler-7"}, actor="ann", reason=EVIL).id
    ledger.request_deletion(TOMBSTONE, {"key": "6b6579"}, actor="producer", reason="a tombstone in the topic")
    ledger.deletion_removed(TOMBSTONE, samples=31, refusals=4, adapters={}, store_version=3)
    page = visitor.get("/audit/deletions").text
    for text in (
        waits,
        "crawler-7",
        "ann",
        TOMBSTONE,
        "key 6b6579",
        "a tombstone in the topic",
        ">31<",
        ">4<",
        "waits",
    ):
        assert text in page
    assert EVIL not in page and "&lt;script&gt;" in page
    removed = visitor.get("/audit/deletions?state=removed").text
    assert TOMBSTONE in removed and waits not in removed
    assert "No deletion is in this state" in visitor.get("/audit/deletions?state=done").text
    assert visitor.get("/audit/deletions?state=lost").status_code == 422


def test_older_ones_are_a_click_away(visitor: TestClient, ledger: Ledger) -> None:
    for number in range(3):
        ledger.request_deletion(f"deletion-{number}", {"source": "cam"}, actor="ann", reason="r")
    page = visitor.get("/audit/deletions?limit=2").text
    assert "deletion-2" in page and "deletion-0" not in page and "limit=52" in page


def test_the_receipt_names_what_learned_from_it_and_the_first_update_without_it(
    visitor: TestClient, ledger: Ledger
) -> None:
    ledger.request_deletion(TOMBSTONE, {"key": "6b6579"}, actor="producer", reason="a tombstone in the topic")
    link = f"/audit/deletions/{quote(TOMBSTONE)}"
    assert link in visitor.get("/audit/deletions").text
    assert "none yet" in visitor.get(link).text and "Maintenance has not come to it" in visitor.get(link).text
    adapters = {"learned": ["clip-0123456789ab"], "may_have_replayed": ["clip-ba9876543210"]}
    ledger.deletion_removed(TOMBSTONE, samples=31, refusals=4, adapters=adapters, store_version=3)
    ledger.begin_update(
        "update-next", family="clip", recipe={}, seed=0, store_version=3, data_from={}, data_to={}, incumbent=None
    )
    ledger.list_deletions_in("update-next", 3)
    ledger.deletion_done(TOMBSTONE)
    page = visitor.get(link).text
    for text in (
        "31 samples, 4 refused records",
        "clip-0123456789ab",
        "clip-ba9876543210",
        "/gate/update-next",
        "done",
    ):
        assert text in page
    receipt = visitor.get(f"{link}/receipt").json()
    assert (receipt["id"], receipt["state"], receipt["adapters"]) == (TOMBSTONE, "done", adapters)


@pytest.mark.parametrize("name", ["deletion-nowhere", "x" * 400, "deletion-nowhere/receipt"])
def test_a_deletion_that_is_not_there_is_said_so(visitor: TestClient, name: str) -> None:
    answer = visitor.get(f"/audit/deletions/{name}")
    assert answer.status_code == 404 and "no such deletion" in answer.text
