"""Deletions over HTTP: asked for by operators, named by field where they are wrong, and followed by their receipts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from serving.http.deletion_service import RequestedDeletions
from streams.rows import Position
from streams.store import SampleStore
from tests.support.samples import TOPIC, put, refusal, sample
from tests.unit.serving.auth_app import OPERATOR, Door, Keys
from tests.unit.serving.auth_app import refusal as refused
from tests.unit.serving.scripted_vlms import app_of

PATH = "/admin/v1/deletions"


@pytest.fixture
def door(closed: Door) -> Door:
    """A server over a store with two samples and a refusal of one source, and another sample."""
    rows = [sample(0, 0, source="cam"), sample(0, 1, source="cam"), {**refusal(0, 2), "source": "cam"}, sample(0, 3)]
    put(SampleStore(closed.settings.lake), rows, Position(TOPIC, 0, 4))
    deletions = RequestedDeletions(closed.settings, closed.ledger)
    closed.app = app_of(replace(closed.gateway(), deletions=deletions))
    return closed


async def ask(door: Door, key: str = OPERATOR, **body: Any) -> Any:
    return await door.send("POST", PATH, key, json={"reason": "asked to", **body})


async def test_a_deletion_is_requested_and_followed(door: Door, keys: Keys) -> None:
    answer = await ask(door, keys.of("operate"), selector={"source": "cam", "before": "2026-06-01T00:00:00Z"})
    assert answer.status_code == 202
    made = answer.json()
    assert (made["object"], made["state"], made["samples"], made["done_at"]) == ("deletion", "requested", 0, None)
    assert made["selector"] == {"source": "cam", "before": "2026-06-01T00:00:00+00:00"}
    assert made["actor"].startswith("key:")
    assert (await door.get(f"{PATH}/{made['id']}", OPERATOR)).json() == made
    door.ledger.deletion_removed(
        made["id"], samples=2, refusals=1, adapters={"learned": ["clip-a"], "may_have_replayed": []}, store_version=3
    )
    [listed] = (await door.get(f"{PATH}?limit=1", OPERATOR)).json()["data"]
    assert (listed["state"], listed["samples"], listed["adapters"]["learned"]) == ("removed", 2, ["clip-a"])
    assert listed["removed_at"] is not None
    [audit] = door.ledger.audit_rows(1)
    assert (audit.action, audit.detail["reason"]) == ("delete", "asked to")


async def test_a_dry_run_counts_and_requests_nothing(door: Door) -> None:
    before = door.ledger.deletions()
    answer = await ask(door, selector={"source": "cam"}, dry_run=True)
    assert (answer.status_code, answer.json()) == (
        200, {"object": "deletion.selection", "samples": 2, "refusals": 1},
    )  # fmt: skip
    assert door.ledger.deletions() == before


async def test_they_are_listed_by_state_and_newest_first(door: Door) -> None:
    for domain in ("a", "b", "c"):
        await ask(door, selector={"domain": domain})
    data = (await door.get(f"{PATH}?limit=2", OPERATOR)).json()["data"]
    assert [each["selector"]["domain"] for each in data] == ["c", "b"]
    door.ledger.deletion_done(data[0]["id"])
    [done] = (await door.get(f"{PATH}?state=done", OPERATOR)).json()["data"]
    assert done["selector"]["domain"] == "c"


async def test_a_tombstones_deletion_is_found_by_its_name(door: Door) -> None:
    door.ledger.request_deletion("tombstone t:0:5", {"key": "00"}, actor="producer", reason="r")
    assert (await door.get(f"{PATH}/tombstone%20t:0:5", OPERATOR)).json()["id"] == "tombstone t:0:5"
    refused(await door.get(f"{PATH}/tombstone%20t:0:6", OPERATOR), 404, "deletion_not_found")


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
async def test_what_is_wrong_is_named_and_nothing_is_requested(door: Door, body: dict[str, Any], param: str) -> None:
    before = door.ledger.deletions()
    answer = await ask(door, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert door.ledger.deletions() == before


async def test_only_operators_delete_and_see_deletions(door: Door, keys: Keys) -> None:
    body, before = {"selector": {"source": "cam"}}, door.ledger.deletions()
    for path in (PATH, f"{PATH}/d1"):
        refused(await door.get(path), 401, "invalid_api_key")
    for key in (keys.of("infer"), keys.of("publish")):
        refused(await ask(door, key, **body), 403, "insufficient_scope")
        refused(await door.get(PATH, key), 403, "insufficient_scope")
    assert door.ledger.deletions() == before


async def test_the_schema_tells_what_a_deletion_is(door: Door) -> None:
    schema = (await door.get("/openapi.json", OPERATOR)).json()
    call = schema["paths"][PATH]["post"]
    assert call["responses"]["202"]["content"]["application/json"]["schema"]["$ref"].endswith("/DeletionBody")
    fields = call["requestBody"]["content"]["application/json"]["schema"]["properties"]["selector"]["properties"]
    assert set(fields) == {"id", "source", "domain", "concept", "label", "key", "record", "before"}
    assert schema["components"]["schemas"]["DeletionBody"]["properties"]["state"]["enum"] == [
        "requested", "removed", "done",
    ]  # fmt: skip
