"""Forms of operators without a server or a broker: what they ask, and that nothing is lost when something is away."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from core.ledger import Ledger
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.pictures import png
from tests.unit.console.test_pages import settings

PARTIAL = {"hx-request": "true", "hx-target": "dialog"}


@pytest.fixture(autouse=True)
def _released(ledger: Ledger) -> None:
    ledger.commit_release(1, clip=None, vlm=None, actor="controller", reason="first start", proposal_id=None)
    ledger.commit_release(2, clip="clip-a", vlm=None, actor="updater", reason="passed", proposal_id=None)


@pytest.mark.parametrize(
    "action", ["rollback", "rollback?to=1&family=clip", "release?clip=base", "promote", "hold", "resume"]
)
def test_an_action_is_a_part_in_a_page_and_a_page_without_a_script(operator: TestClient, action: str) -> None:
    part = operator.get(f"/releases/{action}", headers=PARTIAL).text
    assert "What will happen" in part and "<html" not in part
    page = operator.get(f"/releases/{action}").text
    assert "<html" in page and 'id="dialog-title"' in page and "What will happen" in page


def test_an_action_while_the_server_is_away_says_so_and_keeps_what_was_typed(operator: TestClient) -> None:
    form = {"reason": "wrong colours", "expected_live": "2"}
    answer = operator.post("/releases/rollback", data=form, headers=PARTIAL)
    assert answer.status_code == 502
    assert "does not answer" in answer.text and ">wrong colours</textarea>" in answer.text


def test_a_reason_of_blanks_is_none(operator: TestClient) -> None:
    for action in ("rollback", "release", "promote", "hold", "resume"):
        answer = operator.post(f"/releases/{action}", data={"reason": "  ", "expected_live": "2", "clip": "base"})
        assert answer.status_code == 400 and "Say why" in answer.text, action


def test_an_unknown_action_is_no_action(operator: TestClient) -> None:
    assert operator.post("/releases/drop", data={"reason": "x", "expected_live": "2"}).status_code == 422


def test_refused_records_are_shown_with_what_can_be_seen_of_them(operator: TestClient, tmp_path: Path) -> None:
    value = json.dumps({"text": "<b>bold</b>", "domain": "cats"}).encode()
    refuse(tmp_path, value, png())
    page = operator.get("/quarantine").text
    assert page.count('class="card"><img') == 2 and "The picture is damaged" in page
    assert "No record was refused for this reason" in operator.get("/quarantine?reason=empty").text
    assert '<option value="&lt;cam 1&gt;" >&lt;cam 1&gt; (1)</option>' in page and "The picture is damaged (2)" in page
    of_one = operator.get("/quarantine", params={"source": "<cam 1>"}).text
    assert of_one.count('class="card"><img') == 1 and "samples:0:1" in of_one
    assert "No record of this source was refused" in operator.get("/quarantine?source=other").text
    record = operator.get("/quarantine/samples:0:0", headers=PARTIAL).text
    assert "&lt;b&gt;bold&lt;/b&gt;" in record and "byte for byte" in record
    pictures = [operator.get(f"/quarantine/samples:0:{offset}/picture").headers["content-type"] for offset in (0, 1)]
    assert pictures == ["image/svg+xml", "image/png"], "the sign for no picture, and a picture drawn again"
    for place in ("samples:0:9", "nowhere"):
        assert operator.get(f"/quarantine/{place}").status_code == 404


def test_a_record_that_cannot_be_sent_stays_where_it_is(
    operator: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streams.ingest.resubmit.CONNECT_SECONDS", 0.3)
    refuse(tmp_path, b"not json")
    form = {"reason": "try it", "csrf": operator.headers["x-csrf-token"]}
    answer = operator.post("/quarantine/samples:0:0/resubmit", data=form, headers=PARTIAL)
    assert answer.status_code == 502 and "Not sent" in answer.text and ">try it</textarea>" in answer.text
    assert "could not be sent" in operator.get("/quarantine").text


def refuse(home: Path, *values: bytes) -> None:
    """Quarantined records, as ingest would have stored them."""
    rows = [
        {
            "kind": "quarantine", "topic": "samples", "partition": 0, "offset": offset, "reason": "image_undecodable",
            "detail": "it is broken.", "ingested_at": datetime.now(UTC), "original": value, "original_key": None,
            "original_headers": "[]", "source": f"<cam {offset}>",
        }
        for offset, value in enumerate(values)
    ]  # fmt: skip
    SampleStore(settings(home).lake).put(rows, [Position("samples", 0, len(rows))])
