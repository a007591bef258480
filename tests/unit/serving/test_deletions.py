"""Deletions over HTTP: asked for by operators, named by field where they are wrong, and followed by their receipts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from serving.http.store_services import DeletionService
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, refusal, sample
from tests.unit.serving.auth_app import OPERATOR, AuthApp, Keys
from tests.unit.serving.auth_app import refusal as refused
from tests.unit.serving.scripted_vlms import app_of

PATH = "/admin/v1/deletions"


@pytest.fixture
def auth_app(closed: AuthApp) -> AuthApp:
    """A server over a store with two samples and a refusal of one source, and another sample."""
    rows = [sample(0, 0, source="cam"), sample(0, 1, source="cam"), {**refusal(0, 2), "source": "cam"}, sample(0, 3)]
    put(SampleStore(closed.settings.lake), rows, Position(TOPIC, 0, 4))
    deletions = DeletionService(closed.settings, closed.ledger)
    closed.app = app_of(replace(closed.app_state(), deletions=deletions))
    return closed


async def ask(auth_app: AuthApp, key: str = OPERATOR, **body: Any) -> Any:
    return await auth_app.send("POST", PATH, key, json={"reason": "asked to", **body})


async def test_a_deletion_is_requested_and_followed(auth_app: AuthApp, keys: Keys) -> None:
    answer = await ask(auth_app, keys.of("operate"), selector={"source": "cam", "before": "2026-06-01T00:00:00Z"})
    assert answer.status_code == 202
    made = answer.json()
    assert (made["object"], made["state"], made["samples"], made["done_at"]) == ("deletion", "requested", 0, None)
    assert made["selector"] == {"source": "cam", "before": "2026-06-01T00:00:00+00:00"}
    assert made["actor"].startswith("key:")
    assert (await auth_app.get(f"{PATH}/{made['id']}", OPERATOR)).json() == made
    auth_app.ledger.deletion_removed(
        made["id"], samples=2, refusals=1, adapters={"learned": ["clip-a"], "may_have_replayed": []}, store_version=3
    )
    [listed] = (await auth_app.get(f"{PATH}?limit=1", OPERATOR)).json()["data"]
    assert (listed["state"], listed["samples"], listed["adapters"]["learned"]) == ("removed", 2, ["clip-a"])
    assert listed["removed_at"] is not None
    [audit] = auth_app.ledger.audit_rows(1)
    assert (audit.action, audit.detail["reason"]) == ("delete", "asked to")


async def test_a_dry_run_counts_and_requests_nothing(auth_app: AuthApp) -> None:
    before = auth_app.ledger.deletions()
    answer = await ask(auth_app, selector={"source": "cam"}, dry_run=True)
    assert (answer.status_code, answer.json()) == (
        200, {"object": "deletion.selection", "samples": 2, "refusals": 1},
    )  # fmt: skip
    assert auth_app.ledger.deletions() == before


async def test_they_are_listed_by_state_and_newest_first(auth_app: AuthApp) -> None:
    for domain in ("a", "b", "c"):
        await ask(auth_app, selector={"domain": domain})
    data = (await auth_app.get(f"{PATH}?limit=2", OPERATOR)).json()["data"]
    assert [each["selector"]["domain"] for each in data] == ["c", "b"]
    auth_app.ledger.deletion_done(data[0]["id"])
    [done] = (await auth_app.get(f"{PATH}?state=done", OPERATOR)).json()["data"]
    assert done["selector"]["domain"] == "c"


async def test_a_tombstones_deletion_is_found_by_its_name(auth_app: AuthApp) -> None:
    auth_app.ledger.request_deletion("tombstone t:0:5", {"key": "00"}, actor="producer", reason="r")
    assert (await auth_app.get(f"{PATH}/tombstone%20t:0:5", OPERATOR)).json()["id"] == "tombstone t:0:5"
    refused(await auth_app.get(f"{PATH}/tombstone%20t:0:6", OPERATOR), 404, "deletion_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"selector": {}}, "selector"),
        ({"selector": {"before": "2026-01-01T00:00:00Z"}}, "selector"),
        ({"selector": {"id": "abc"}}, "selector.id"),
        ({"selector": {"key": "xyz"}}, "selector.key"),
        ({"selector": {"record": "t:0"}}, "selector.record"),
        ({"selector": {"record": "t:0:99999999999999999999"}, "dry_run": True}, "selector.record"),
        ({"selector": {"source": ""}}, "selector.source"),
        ({"selector": {"source": "a", "before": "yesterday"}}, "selector.before"),
        ({"selector": {"source": "a", "before": "0001-01-01T00:00:00Z"}}, "selector.before"),
        ({"selector": {"until": "t:0:1"}}, "selector.until"),
        ({"selector": {"source": "a"}, "reason": ""}, "reason"),
        ({}, "selector"),
    ],
)
async def test_what_is_wrong_is_named_and_nothing_is_requested(
    auth_app: AuthApp, body: dict[str, Any], param: str
) -> None:
    before = auth_app.ledger.deletions()
    answer = await ask(auth_app, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert auth_app.ledger.deletions() == before


async def test_only_operators_delete_and_see_deletions(auth_app: AuthApp, keys: Keys) -> None:
    body, before = {"selector": {"source": "cam"}}, auth_app.ledger.deletions()
    for path in (PATH, f"{PATH}/d1"):
        refused(await auth_app.get(path), 401, "invalid_api_key")
    for key in (keys.of("infer"), keys.of("publish")):
        refused(await ask(auth_app, key, **body), 403, "insufficient_scope")
        refused(await auth_app.get(PATH, key), 403, "insufficient_scope")
    assert auth_app.ledger.deletions() == before
