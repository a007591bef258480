"""What pages say of replicas, the stream, costs and deletions, and how much they ask for it."""

from __future__ import annotations

import html
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from core.errors import StoreUnavailable
from core.ledger import Ledger
from ops.console.app import build_console
from ops.console.data import ConsoleData
from ops.console.pages.models import served_models
from ops.console.pages.overview import backfills, problems
from ops.console.pages.stream import origins
from streams.store.deletion import request_deletion
from streams.store.rows import Position, SampleTable
from streams.store.sample_store import SampleStore
from tests.support.pictures import png
from tests.support.samples import refusal, sample
from tests.support.story import EVIL, LOST, audit
from tests.unit.ops.console.conftest import LOCAL, release, settings, text

STATUS: dict[str, Any] = {
    "controller": {
        "started": True, "trouble": "", "in_flight": {}, "rollout": {},
        "resident": [
            {"release": 1, "adapter": None, "image_space": "img-base", "text_space": "txt-base", "vlm": None},
            {"release": 2, "adapter": "clip-a", "image_space": "img-base", "text_space": "txt-a", "vlm": None},
        ],
        "replicas": {"Encoder": {"RUNNING": 2, "STARTING": 1}, "Ingress": {"RUNNING": 1}},
        "encoders": 2 * [{"precision": "bfloat16", "device": "cpu", "base_digest": "e" * 64}],
        "vlm": [{"engine": "vllm", "precision": "float32"}],
    },
    "catalog": {"corpus_rows": 40, "coverage": 0.5, "spaces": {"img-base": {"coverage": 0.5, "seconds_left": 4.0}}},
}  # fmt: skip
TOMBSTONE = "tombstone shop.samples:1:17"


def ask_again(visitor: TestClient) -> None:
    visitor.app.state.data._cache.clear()  # type: ignore[attr-defined]


def test_engine_and_precision_are_what_the_replicas_say(
    visitor: TestClient, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(ledger, "clip-a")
    away = text(visitor, "/models")
    assert "not known" in away and "bfloat16" not in away, "the settings are no measurement"
    assert "serve.precision auto" in away
    monkeypatch.setattr(ConsoleData, "_status", lambda _: STATUS)
    ask_again(visitor)
    page = text(visitor, "/models")
    for fact in ("bfloat16 cpu", f"shipped ({'e' * 12})", "2 running", "1 starting"):
        assert fact in page
    newest, older = page.split('<td class="n">2</td>')[1].split('<td class="n">1</td>')
    assert "50%" in newest and "clip-a" in newest and "same" not in newest
    assert 'txt-base</code> <span class="hint">differs' in older and 'img-base</code> <span class="hint">same' in older
    assert "CLIP: bfloat16 cpu" in text(visitor, "/overview/now")
    without = settings(tmp_path)
    assert [model.family for model in served_models(STATUS, None, without)] == ["clip"]
    with_vlm = without.model_copy(update={"base": without.base.model_copy(update={"vlm": "small"})})
    assert served_models(STATUS, None, with_vlm)[1].engines == ("vllm float32",)


def status(live: float = 1.0, next_one: float = 1.0, trouble: str = "", **left: float) -> dict[str, Any]:
    rows = [{"release": 2, "image_space": "a"}, {"release": 1, "image_space": "old"}]
    spaces = {"a": {"coverage": live}, "b": {"coverage": next_one, **left}}
    return {"controller": {"started": True, "trouble": trouble, "resident": rows}, "catalog": {"spaces": spaces}}


def test_what_is_not_well_is_said_in_words() -> None:
    assert problems(None) == ["The model server does not answer."]
    assert problems(status(live=1.0, next_one=0.04)) == [], "an index that is not live yet is no trouble"
    assert "93% of the pictures" in problems(status(live=0.93))[0]
    assert "because" in problems(status(trouble="because"))[0]
    assert "the VLM is starting" in problems({**status(), "vlm_problem": "the VLM is starting."})[0]
    assert backfills(None) == backfills(status()) == []
    assert backfills(status(next_one=0.25)) == ["The pictures are being prepared for the next release: 25%."]
    assert backfills(status(next_one=0.25, seconds_left=9000.0))[0].endswith("25%, about 2.5 h more.")


def test_a_store_that_hangs_is_said_so(visitor: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreUnavailable("the bucket does not exist.", "Make it.", "refused")

    with monkeypatch.context() as patch:
        patch.setattr(SampleTable, "open", refuse)
        page = visitor.get("/stream").text
    assert "Store: refused" in page and "the bucket does not exist." in page
    monkeypatch.setattr("ops.console.data.PATIENCE_SECONDS", 0.5)
    answers = threading.Event()
    monkeypatch.setattr(SampleTable, "open", lambda *_: answers.wait(60))
    try:
        with TestClient(build_console(settings(tmp_path)), base_url=LOCAL) as another:
            for path in ("/", "/stream"):
                slow = another.get(path)
                assert slow.status_code == 503 and "Store: slow" in slow.text
    finally:
        answers.set()


def test_the_stream_page_counts_by_kind(visitor: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No samples yet" in text(visitor, "/stream")
    store = SampleStore(settings(tmp_path).lake)
    place = {"topic": "samples", "partition": 0, "ingested_at": datetime.now(UTC)}
    rows = [sample(0, number, source=source) for number, source in enumerate(("cam-1", "cam-1", "<cam 2>"))]
    rows[0]["image"] = png()
    rows.append({**place, "kind": "duplicate", "offset": 3, "id": f"{0:064x}", "reason": "same_image"})
    rows += [refusal(0, 4), {**place, "kind": "gap", "offset": 5, "until": 25, "reason": "retention"}]
    store.put(rows, [Position("samples", 0, 25)])
    assert origins(store)["samples"]["source"] == [("cam-1", 2), ("<cam 2>", 1)]
    ask_again(visitor)
    page = visitor.get("/stream").text
    for fact in (
        "samples:0, offsets 5 to 24", "retention", "Neither a picture nor JSON", "&lt;cam 2&gt;", "samples:0</td>",
        'class="n">25</td>', "Samples</dt><dd>3", "Duplicates</dt><dd>1", "Refused</dt><dd>1",
        "Lost offsets</dt><dd>20",
    ):  # fmt: skip
        assert fact in page
    assert "<cam 2>" not in page
    kinds = [visitor.get(f"/samples/{row['id']}.png").headers["content-type"] for row in rows[:2]]
    assert kinds == ["image/png", "image/svg+xml"], "a picture of the store, and the sign for one that is none"
    monkeypatch.setattr("ops.console.pages.stream.COUNTED_SAMPLES", 1)
    assert origins(store)["samples"] == {}, "a larger store is not scanned"


def test_each_deletion_is_listed_and_its_receipt_names_what_learned_from_it(
    visitor: TestClient, ledger: Ledger
) -> None:
    assert "Nothing here" in visitor.get("/audit/deletions").text
    assert "Nothing was deleted" in text(visitor, "/stream")
    assert 'href="/audit/deletions"' in visitor.get("/audit").text
    waits = request_deletion(ledger, {"source": "crawler-7"}, actor="ann", reason=EVIL).id
    ledger.request_deletion(TOMBSTONE, {"key": "6b6579"}, actor="producer", reason="a tombstone in the topic")
    link = f"/audit/deletions/{quote(TOMBSTONE)}"
    assert "none yet" in visitor.get(link).text and "Maintenance has not come to it" in visitor.get(link).text
    adapters = {"learned": ["clip-0123456789ab"], "may_have_replayed": ["clip-ba9876543210"]}
    ledger.deletion_removed(TOMBSTONE, samples=31, refusals=4, adapters=adapters, store_version=3)
    page = visitor.get("/audit/deletions").text
    told = (waits, "crawler-7", "ann", TOMBSTONE, "key 6b6579", "a tombstone in the topic", ">31<", ">4<", "waits")
    assert [fact for fact in (*told, link) if fact not in page] == []
    assert EVIL not in page and "&lt;script&gt;" in page
    for query in ("state=removed", "limit=1"):
        some = visitor.get(f"/audit/deletions?{query}").text
        assert TOMBSTONE in some and waits not in some
    assert "limit=51" in some, "older ones are a click away"
    assert "No deletion is in this state" in visitor.get("/audit/deletions?state=done").text
    assert visitor.get("/audit/deletions?state=lost").status_code == 422
    stream = text(visitor, "/stream")
    assert "1 waiting, 1 removed and not yet rewritten, 0 done" in stream
    assert f'href="{link}"' in stream and "31 samples, 4 refused records" in stream

    data: dict[str, Any] = {"recipe": {}, "seed": 0, "store_version": 3, "data_from": {}, "data_to": {}}
    ledger.begin_update("update-next", family="clip", incumbent=None, **data)
    ledger.list_deletions_in("update-next", 3)
    ledger.deletion_done(TOMBSTONE)
    page = visitor.get(link).text
    told = ("31 samples, 4 refused records", "clip-0123456789ab", "clip-ba9876543210", "/gate/update-next", "done")
    assert [fact for fact in told if fact not in page] == []
    receipt = visitor.get(f"{link}/receipt").json()
    assert (receipt["id"], receipt["state"], receipt["adapters"]) == (TOMBSTONE, "done", adapters)
    for name in ("deletion-nowhere", "x" * 400, "deletion-nowhere/receipt"):
        answer = visitor.get(f"/audit/deletions/{name}")
        assert answer.status_code == 404 and "no such deletion" in answer.text


def test_a_failed_audit_of_what_is_live_is_shown_with_the_rollback_until_it_is_taken_back(
    operator: TestClient, ledger: Ledger, tmp_path: Path
) -> None:
    ledger.register_adapter("clip-a", "clip", "b", "i", "t", {})
    release(ledger)
    release(ledger, "clip-a")
    ledger.record_release_audit(audit(2, "clip-a"))
    shown = "Release 2 failed its audit, and its CLIP is live"
    for page in ("/", "/gate", "/releases"):
        told = operator.get(page).text
        assert shown in told and LOST in html.unescape(told), page
        assert 'href="/releases/rollback?to=1&amp;family=clip"' in told, page
        with TestClient(build_console(settings(tmp_path, public=True)), base_url=LOCAL) as screen:
            told = screen.get(page).text
            assert shown in told and "/releases/rollback" not in told and "ratchet releases" not in told, page
    assert "The CLIP changes from clip-a to the base alone." in text(operator, "/releases/rollback?to=1&family=clip")
    gate = text(operator, "/gate")
    assert "0 of 8 releases since the last one" in gate and "the base, release 1" in gate
    release(ledger)
    assert shown not in operator.get("/releases").text


def test_many_viewers_cost_one_question(tmp_path: Path) -> None:
    data, asked = ConsoleData(settings(tmp_path)), []

    def question() -> int:
        asked.append(1)
        return len(asked)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: data.cached("overview", question, seconds=60), range(40)))
    assert found == [1] * 40
    assert data.cached("overview", question, seconds=0.0) == 2, "who wants it fresh gets it fresh"
    data.invalidate()
    assert data.cached("overview", question, seconds=60) == 3
    with pytest.raises(ZeroDivisionError):
        data.cached("x", lambda: 1 // 0)
    assert data.cached("x", lambda: 7) == 7, "one that failed is asked again"
