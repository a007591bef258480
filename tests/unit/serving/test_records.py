"""Receipts, refused records and deletions over HTTP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.errors import AlreadyResubmitted, BrokerError, RecordError, UnknownRecord
from serving.http import store_services as module
from serving.http.store_services import DeletionService, ReceiptService
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import put, sample
from tests.support.samples import refusal as refused_record
from tests.unit.serving.auth_app import OPERATOR, AuthApp, Keys, refusal
from tests.unit.serving.scripted_vlms import app_of

PATH = "/admin/v1/deletions"
FIRST = sample(0, 0, source="cam")


@pytest.fixture
def server(closed: AuthApp) -> AuthApp:
    repeated = {"kind": "duplicate", "id": FIRST["id"], "duplicate_of": FIRST["id"], "reason": "duplicate_exact"}
    rows = [
        FIRST, sample(0, 1, source="cam"), {**refused_record(0, 2, reason="schema"), "source": "cam"}, sample(0, 3),
        {name: FIRST[name] for name in ("topic", "partition", "ingested_at")} | repeated | {"offset": 4},
    ]  # fmt: skip
    put(SampleStore(closed.settings.lake), rows, Position("samples", 0, 5))
    services = {
        "receipts": ReceiptService(closed.settings), "deletions": DeletionService(closed.settings, closed.ledger),
    }  # fmt: skip
    closed.app = app_of(replace(closed.app_state(), **services))
    return closed


async def test_a_position_and_an_id_have_receipts_and_what_has_not_been_read_yet_is_404(server: AuthApp) -> None:
    answer = await server.get("/v1/records/samples/0/2", OPERATOR)
    receipt = {
        "position": "samples:0:2", "stream": "samples", "partition": 0, "offset": 2, "outcome": "refused",
        "reason": "schema", "detail": "no good", "source": "cam", "time": "2026-01-02T00:00:00+00:00",
    }  # fmt: skip
    assert (answer.status_code, answer.json()) == (200, {"object": "list", "data": [receipt]})
    for text in (FIRST["id"], FIRST["id"][:8]):
        listed = (await server.get(f"/v1/records?id={text}", OPERATOR)).json()["data"]
        assert [(each["outcome"], each["id"]) for each in listed] == [
            ("stored", FIRST["id"]), ("duplicate", FIRST["id"]),
        ]  # fmt: skip
    refusal(await server.get(f"/v1/records?id={'f' * 64}", OPERATOR), 404, "record_not_found")
    for path in ("samples/0/5", "samples/7/0", "other/0/0", f"samples/0/{2**62}"):
        refused = await server.get(f"/v1/records/{path}", OPERATOR)
        assert "not been read yet" in refusal(refused, 404, "not_read_yet")


@pytest.mark.parametrize(
    "path",
    [
        "/t/-1/0", "/t/0/-1", "/t/x/0", f"/t/0/{2**63}", f"/t/{2**31}/0", "/a:b/0/0", f"/{'t' * 261}/0/0", "?id=abc",
        "?id=zzzzzzzz", "", f"?id={'a' * 65}",
    ],
)  # fmt: skip
async def test_what_is_no_position_and_no_id_is_400(server: AuthApp, path: str) -> None:
    assert (await server.get(f"/v1/records{path}", OPERATOR)).status_code == 400


async def test_a_store_that_is_away_or_hangs_is_503(server: AuthApp, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in Path(server.settings.lake).rglob("*.lance"):
        if file.is_file():
            file.unlink()
    refusal(await server.get("/v1/records/samples/0/0", OPERATOR), 503, "store")
    monkeypatch.setattr(module, "TRACE_SECONDS", 0.0)
    refused = await server.get("/v1/records/samples/0/0", OPERATOR)
    assert "did not answer" in refusal(refused, 503, "store")
    assert refused.headers["retry-after"]


async def test_a_refused_record_is_sent_again_by_whoever_may_publish(closed: AuthApp, keys: Keys) -> None:
    asked = {"place": "t:0:1", "reason": "mended"}
    answer = await closed.send("POST", "/admin/v1/quarantine/resubmit", keys.of("publish"), json=asked)
    assert answer.json() == {"object": "resubmission", "place": "t:0:1", "topic": "t", "partition": 0, "offset": 9}
    assert closed.desk.actors == ["key:publish-none"]
    for failure, status, code in [
        (UnknownRecord("none there"), 404, "record_not_found"),
        (AlreadyResubmitted("was sent"), 409, "already_resubmitted"),
        (RecordError("empty", "no value"), 400, "empty"),
        (BrokerError("away"), 503, "broker"),
    ]:
        closed.desk.failure = failure
        refused = await closed.send("POST", "/admin/v1/quarantine/resubmit", OPERATOR, json=asked)
        refusal(refused, status, code)
        assert refused.json()["error"]["param"] == ("place" if status in (400, 404) else None)


async def test_refused_records_are_sent_again_by_a_filter(closed: AuthApp, keys: Keys) -> None:
    path, publish = "/admin/v1/quarantine/resubmit", keys.of("publish")
    body = {"filter": {"reason": "schema", "source": "cam", "limit": 7}, "reason": "mended", "dry_run": True}
    answer = await closed.send("POST", path, publish, json=body)
    assert answer.json() == {"object": "resubmission.report", "limit": 7, "source": "cam", "dry_run": True}
    assert closed.desk.actors == ["key:publish-none"]
    for wrong, param in [
        ({"filter": {"reason": "nonsense"}}, "filter.reason"), ({"filter": {"limit": 501}}, "filter.limit"),
        ({}, None), ({"filter": {}, "place": "t:0:1"}, None), ({"filter": {}, "force": True}, None),
        ({"place": "t:0:1", "dry_run": True}, None), ({"filter": {"since": "3000-01-01T00:00:00Z"}}, "filter.since"),
    ]:  # fmt: skip
        refused = await closed.send("POST", path, publish, json={"reason": "r", **wrong})
        refusal(refused, 400, "invalid_value")
        assert refused.json()["error"]["param"] == param
    assert len(closed.desk.actors) == 1


async def test_the_list_of_refused_records_checks_what_it_is_asked(closed: AuthApp) -> None:
    listed = await closed.get("/admin/v1/quarantine?limit=7&reason=schema&source=cam", OPERATOR)
    [row] = listed.json()["data"]
    assert row == {"place": "t:0:1", "limit": 7, "reason": "schema", "source": "cam"}
    assert "counts" not in listed.json()
    counted = await closed.get("/admin/v1/quarantine?counts=true", OPERATOR)
    assert counted.json()["counts"] == {"reason": {"schema": 2}, "source": {"cam": 2}}
    for query in ("limit=0", "limit=501", "reason=nonsense", f"source={'x' * 257}"):
        refusal(await closed.get(f"/admin/v1/quarantine?{query}", OPERATOR), 400, "invalid_value")


async def ask(server: AuthApp, key: str = OPERATOR, **body: Any) -> Any:
    return await server.send("POST", PATH, key, json={"reason": "asked to", **body})


async def test_a_deletion_is_requested_and_followed(server: AuthApp, keys: Keys) -> None:
    answer = await ask(server, keys.of("operate"), selector={"source": "cam", "before": "2026-06-01T00:00:00Z"})
    assert answer.status_code == 202
    made = answer.json()
    assert (made["object"], made["state"], made["samples"], made["done_at"]) == ("deletion", "requested", 0, None)
    assert made["selector"] == {"source": "cam", "before": "2026-06-01T00:00:00+00:00"}
    assert made["actor"].startswith("key:")
    assert (await server.get(f"{PATH}/{made['id']}", OPERATOR)).json() == made
    server.ledger.deletion_removed(
        made["id"], samples=2, refusals=1, adapters={"learned": ["clip-a"], "may_have_replayed": []}, store_version=3
    )
    [listed] = (await server.get(f"{PATH}?limit=1", OPERATOR)).json()["data"]
    assert (listed["state"], listed["samples"], listed["adapters"]["learned"]) == ("removed", 2, ["clip-a"])
    assert listed["removed_at"] is not None
    [audit] = server.ledger.audit_rows(1)
    assert (audit.action, audit.detail["reason"]) == ("delete", "asked to")


async def test_a_dry_run_counts_and_requests_nothing(server: AuthApp) -> None:
    before = server.ledger.deletions()
    answer = await ask(server, selector={"source": "cam"}, dry_run=True)
    assert answer.status_code == 200
    assert answer.json() == {"object": "deletion.selection", "samples": 2, "refusals": 1}
    assert server.ledger.deletions() == before


async def test_they_are_listed_by_state_newest_first_and_found_by_name(server: AuthApp) -> None:
    for domain in ("a", "b", "c"):
        await ask(server, selector={"domain": domain})
    data = (await server.get(f"{PATH}?limit=2", OPERATOR)).json()["data"]
    assert [each["selector"]["domain"] for each in data] == ["c", "b"]
    server.ledger.deletion_done(data[0]["id"])
    [done] = (await server.get(f"{PATH}?state=done", OPERATOR)).json()["data"]
    assert done["selector"]["domain"] == "c"
    server.ledger.request_deletion("tombstone t:0:5", {"key": "00"}, actor="producer", reason="r")
    assert (await server.get(f"{PATH}/tombstone%20t:0:5", OPERATOR)).json()["id"] == "tombstone t:0:5"
    refusal(await server.get(f"{PATH}/tombstone%20t:0:6", OPERATOR), 404, "deletion_not_found")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"selector": {}}, "selector"), ({"selector": {"before": "2026-01-01T00:00:00Z"}}, "selector"),
        ({"selector": {"id": "abc"}}, "selector.id"), ({"selector": {"key": "xyz"}}, "selector.key"),
        ({"selector": {"record": "t:0"}}, "selector.record"),
        ({"selector": {"record": "t:0:99999999999999999999"}, "dry_run": True}, "selector.record"),
        ({"selector": {"source": ""}}, "selector.source"),
        ({"selector": {"source": "a", "before": "yesterday"}}, "selector.before"),
        ({"selector": {"source": "a", "before": "0001-01-01T00:00:00Z"}}, "selector.before"),
        ({"selector": {"until": "t:0:1"}}, "selector.until"), ({"selector": {"source": "a"}, "reason": ""}, "reason"),
        ({}, "selector"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named_and_not_requested(server: AuthApp, body: dict[str, Any], param: str) -> None:
    before = server.ledger.deletions()
    answer = await ask(server, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert server.ledger.deletions() == before
