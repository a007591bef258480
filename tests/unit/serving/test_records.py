"""Receipts over HTTP: what became of a record, for whoever may publish."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serving.http import store_services as module
from serving.http.store_services import ReceiptService
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.unit.serving.auth_app import OPERATOR, AuthApp, Keys, refusal
from tests.unit.serving.scripted_vlms import app_of

A = "a" * 64


@pytest.fixture
def auth_app(closed: AuthApp) -> AuthApp:
    """A server over a store with a sample, a duplicate and a refusal."""
    base = {"topic": "t", "partition": 0, "ingested_at": datetime(2026, 1, 1, tzinfo=UTC)}
    rows = [
        {**base, "kind": "sample", "offset": 0, "id": A, "image": b"x", "split": "train"},
        {**base, "kind": "duplicate", "offset": 1, "id": A, "duplicate_of": A, "reason": "duplicate_exact"},
        {**base, "kind": "quarantine", "offset": 2, "reason": "schema", "detail": "field x", "original_headers": "[]"},
    ]
    SampleStore(closed.settings.lake).put(rows, [Position("t", 0, 3)])
    closed.app = app_of(replace(closed.app_state(), receipts=ReceiptService(closed.settings)))
    return closed


async def test_a_position_has_a_receipt(auth_app: AuthApp, keys: Keys) -> None:
    answer = await auth_app.get("/v1/records/t/0/2", keys.of("publish"))
    assert answer.status_code == 200
    assert answer.json() == {
        "object": "list",
        "data": [
            {
                "position": "t:0:2", "stream": "t", "partition": 0, "offset": 2, "outcome": "refused",
                "reason": "schema", "detail": "field x", "time": "2026-01-01T00:00:00+00:00",
            }
        ],
    }  # fmt: skip
    [stored] = (await auth_app.get("/v1/records/t/0/0", OPERATOR)).json()["data"]
    assert (stored["outcome"], stored["id"]) == ("stored", A)


async def test_an_id_has_receipts_of_all_its_records(auth_app: AuthApp) -> None:
    for text in (A, A[:8]):
        listed = (await auth_app.get(f"/v1/records?id={text}", OPERATOR)).json()["data"]
        assert [each["outcome"] for each in listed] == ["stored", "duplicate"]
    refusal(await auth_app.get(f"/v1/records?id={'f' * 64}", OPERATOR), 404, "record_not_found")


async def test_what_has_not_been_read_yet_is_404(auth_app: AuthApp) -> None:
    for path in ("t/0/3", "t/7/0", "other/0/0", f"t/0/{2**62}"):
        refused = await auth_app.get(f"/v1/records/{path}", OPERATOR)
        assert "not been read yet" in refusal(refused, 404, "not_read_yet")


async def test_only_who_may_publish_or_operate_gets_receipts(auth_app: AuthApp, keys: Keys) -> None:
    infer, publish, operate = keys.of("infer"), keys.of("publish"), keys.of("operate")
    for path in ("/v1/records/t/0/0", f"/v1/records?id={A}"):
        refusal(await auth_app.get(path), 401, "invalid_api_key")
        refusal(await auth_app.get(path, infer), 403, "insufficient_scope")
        for key in (publish, operate):
            assert (await auth_app.get(path, key)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/t/-1/0", "/t/0/-1", "/t/x/0", f"/t/0/{2**63}", f"/t/{2**31}/0", "/a:b/0/0", f"/{'t' * 261}/0/0", "?id=abc",
        "?id=zzzzzzzz", "", f"?id={'a' * 65}",
    ],
)  # fmt: skip
async def test_what_is_no_position_and_no_id_is_400(auth_app: AuthApp, path: str) -> None:
    assert (await auth_app.get(f"/v1/records{path}", OPERATOR)).status_code == 400


async def test_a_store_that_is_away_or_hangs_is_503(auth_app: AuthApp, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in Path(auth_app.settings.lake).rglob("*.lance"):
        if file.is_file():
            file.unlink()
    refusal(await auth_app.get("/v1/records/t/0/0", OPERATOR), 503, "store")
    monkeypatch.setattr(module, "TRACE_SECONDS", 0.0)
    refused = await auth_app.get("/v1/records/t/0/0", OPERATOR)
    assert "did not answer" in refusal(refused, 503, "store")
    assert refused.headers["retry-after"]
