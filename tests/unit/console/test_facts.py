"""What is served, what came in and what it costs: shown from the ledger, the store and the server's own words."""

from __future__ import annotations

import html
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from core.ledger import Ledger
from ops.console.data import ConsoleData
from ops.console.pages.budget import UpdateSummary, costs, update_summaries
from ops.console.pages.models import served_models
from ops.console.pages.stream import origins
from streams.store.deletion import request_deletion
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.story import tell
from tests.unit.console.test_pages import settings

STATUS: dict[str, Any] = {
    "controller": {
        "started": True, "trouble": "", "in_flight": {}, "rollout": {},
        "resident": [
            {"release": 1, "adapter": None, "image_space": "img-base", "text_space": "txt-base", "vlm": None},
            {"release": 2, "adapter": "clip-a", "image_space": "img-base", "text_space": "txt-a", "vlm": None},
        ],
        "replicas": {"Encoder": {"RUNNING": 2, "STARTING": 1}, "Ingress": {"RUNNING": 1}},
        "encoders": [
            {"engine": "torch", "precision": "bfloat16", "device": "cpu", "base": "shipped", "base_digest": "e" * 64},
            {"engine": "torch", "precision": "bfloat16", "device": "cpu", "base": "shipped", "base_digest": "e" * 64},
        ],
        "vlm": [{"engine": "vllm", "precision": "float32"}],
    },
    "catalog": {"corpus_rows": 40, "coverage": 0.5, "spaces": {"img-base": {"coverage": 0.5, "seconds_left": 4.0}}},
}  # fmt: skip


def row(kind: str, offset: int, **columns: object) -> dict[str, Any]:
    """A row of the store, as ingest writes it."""
    return {
        "kind": kind,
        "topic": "samples",
        "partition": 0,
        "offset": offset,
        "ingested_at": datetime.now(UTC),
        **columns,
    }


def sample(offset: int, source: str, domain: str = "cats") -> dict[str, Any]:
    return row(
        "sample", offset, id=f"{offset:064x}", text="a cat", domain=domain, source=source, split="train", size=1000
    )


def text(client: TestClient, page: str) -> str:
    answer = client.get(page)
    assert answer.status_code == 200, answer.text
    return " ".join(html.unescape(answer.text).split())


def test_engine_and_precision_are_what_the_replicas_say(
    visitor: TestClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.commit_release(1, clip="clip-a", vlm=None, actor="updater", reason="passed", proposal_id=None)
    away = text(visitor, "/models")
    assert "not known" in away and "bfloat16" not in away, "the settings are no measurement"
    assert "serve.engine auto, serve.precision auto" in away
    monkeypatch.setattr(ConsoleData, "_status", lambda _: STATUS)
    visitor.app.state.data.invalidate()  # type: ignore[attr-defined]
    page = text(visitor, "/models")
    assert "torch bfloat16 cpu" in page and f"shipped ({'e' * 12})" in page
    assert "2 running" in page and "1 starting" in page
    newest, older = page.split('<td class="n">2</td>')[1].split('<td class="n">1</td>')
    assert "50%" in newest and "clip-a" in newest and "same" not in newest
    assert 'txt-base</code> <span class="hint">differs' in older and 'img-base</code> <span class="hint">same' in older
    assert "CLIP: torch bfloat16 cpu" in text(visitor, "/overview/now")


def test_a_vlm_is_listed_only_where_there_is_one(tmp_path: Path) -> None:
    without = settings(tmp_path)
    assert [model.family for model in served_models(STATUS, None, without)] == ["clip"]
    with_vlm = without.model_copy(update={"base": without.base.model_copy(update={"vlm": "small"})})
    assert served_models(STATUS, None, with_vlm)[1].engines == ("vllm float32",)


def test_the_stream_page_counts_kinds_sources_gaps_and_refusals(visitor: TestClient, tmp_path: Path) -> None:
    assert "No samples yet" in text(visitor, "/stream")
    store = SampleStore(settings(tmp_path).lake)
    rows = [sample(0, "cam-1"), sample(1, "cam-1"), sample(2, "<cam 2>")]
    rows.append(row("duplicate", 3, id=f"{0:064x}", reason="same_image", duplicate_of="samples:0:0"))
    rows.append(row("quarantine", 4, reason="not_json", detail="no.", original=b"x", original_headers="[]"))
    rows.append(row("gap", 5, until=25, reason="retention"))
    store.put(rows, [Position("samples", 0, 25)])
    assert origins(store)["samples"]["source"] == [("cam-1", 2), ("<cam 2>", 1)]
    visitor.app.state.data._cache.clear()  # type: ignore[attr-defined]
    page = visitor.get("/stream").text
    assert "samples:0, offsets 5 to 24" in page and "retention" in page
    assert "Neither a picture nor JSON" in page and "&lt;cam 2&gt;" in page and "<cam 2>" not in page
    assert "samples:0</td>" in page and 'class="n">25</td>' in page
    for fact in ("Samples</dt><dd>3", "Duplicates</dt><dd>1", "Refused</dt><dd>1", "Lost offsets</dt><dd>20"):
        assert fact in page


def test_a_store_that_is_too_large_is_not_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SampleStore(settings(tmp_path).lake)
    store.put([sample(0, "cam-1"), sample(1, "cam-1")], [Position("samples", 0, 2)])
    monkeypatch.setattr("ops.console.pages.stream.COUNTED_SAMPLES", 1)
    assert origins(store)["samples"] == {}


def test_deletions_on_the_stream_page_lead_to_their_receipts(visitor: TestClient, ledger: Ledger) -> None:
    assert "Nothing was deleted" in text(visitor, "/stream")
    first = request_deletion(ledger, {"source": "cam-1"}, actor="ann", reason="asked").id
    ledger.deletion_removed(first, samples=3, refusals=1, adapters={}, store_version=2)
    page = text(visitor, "/stream")
    assert "0 waiting, 1 removed and not yet rewritten, 0 done" in page
    assert f'href="/audit/deletions/{first}"' in page and "3 samples, 1 refused records" in page


def test_items_before_the_next_verdict_are_shown_as_n_of_m(visitor: TestClient) -> None:
    for page in ("/gate", "/overview/now"):
        assert "0 of " in text(visitor, page) and "fresh items before the next verdict" in text(visitor, page)


def test_each_release_names_the_base_of_its_clip(visitor: TestClient, ledger: Ledger, tmp_path: Path) -> None:
    ledger.commit_release(1, clip=None, vlm=None, actor="ratchet", reason="first", proposal_id=None)
    assert "CLIP base shipped" in text(visitor, "/releases"), "a release that names none is of the only one"
    live = ledger.live()
    assert live is not None
    ledger.change_base(live, clip=None, base="b" * 64, live_base="a" * 64, rollback=False, actor="ann", reason="newer")
    folder = settings(tmp_path).home / "bases" / "vit-b"
    folder.mkdir(parents=True)
    (folder / "base.json").write_text(f'{{"digest": "{"b" * 64}"}}')
    visitor.app.state.data._cache.clear()  # type: ignore[attr-defined]
    page = text(visitor, "/releases")
    assert f"CLIP base vit-b ({'b' * 12})" in page and f"CLIP base {'a' * 12}" in page and "other base" in page


def test_costs_sum_training_and_gate_apart(visitor: TestClient, ledger: Ledger, tmp_path: Path) -> None:
    tell(settings(tmp_path), tmp_path / "made")
    rows = update_summaries(ledger)
    total = costs(rows)
    assert (total["updates"], total["train_gflops"]) == (2, 2 * 5801.5)
    assert (total["gate_runs"], total["gate_gflops"]) == (2, 640.0)
    again = [
        UpdateSummary(replace(row.update, cost={**row.update.cost, "trained_by": "x"}), row.verdict) for row in rows
    ]
    assert (costs(again)["train_gflops"], costs(again)["gate_runs"]) == (0.0, 2), "a further look is not trained again"
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert costs(rows, tomorrow)["updates"] == 0
    page = text(visitor, "/budget")
    assert "11,603" in page and "640" in page and "Last 24 hours" in page
