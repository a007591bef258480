"""A report names samples and holds nothing of them: it shows what the store has when somebody looks."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient

from core.artifacts import Artifacts
from core.ledger import Ledger
from core.settings import Settings
from ops.console.app import build_console
from streams.store import maintenance
from streams.store.deletion import request_deletion
from streams.store.maintenance import Maintainer
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.samples import TOPIC, put, sample
from tests.unit.console.conftest import settings as console_settings
from tests.unit.gate.builders import changed, fresh_suite, outcomes, picture
from updater.gate.decision import Scores, conclude, decide
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.report import samples_of, with_samples, write_report
from updater.gate.score import Outcomes, thumbnail, worst_answers, worst_items
from updater.gate.suites import Suite, load_suites
from updater.gate.verdict import Regression, Verdict

TEXTS = [f"a private caption {n} of somebody" for n in range(4)]
QUESTIONS = [f"who is number {n} of the family?" for n in range(4)]
ANSWERS = [f"aunt number {n}" for n in range(4)]
NAME = "update-with-samples"


class Captions:
    """The choices of a scorer, which needs no engine for them."""

    def choices(self, suite: Suite) -> tuple[list[str], ...]:
        return sorted({item.text for item in suite.items()}), [item.id for item in suite.items()]


def rows() -> list[dict[str, Any]]:
    return [
        sample(0, n, split="fresh_eval", image=picture(70 + n), text=TEXTS[n], question=QUESTIONS[n], answer=ANSWERS[n],
               domain="family", concept="", source="cam" if n < 2 else "eye")
        for n in range(4)
    ]  # fmt: skip


def fresh(family: str) -> Suite:
    return fresh_suite(pa.Table.from_pylist(rows()), family=family)  # type: ignore[arg-type]


def lost(view: int) -> tuple[Outcomes, Outcomes]:
    """All was right, and then all of one view is wrong: the last choice is the answer."""
    ids = np.array([item.id for item in fresh("clip").items()])
    ranks, answers = np.zeros((4, 2), np.int32), np.zeros((4, 2), np.int32)
    after_ranks, after_answers = ranks.copy(), answers.copy()
    after_ranks[:, view], after_answers[:, view] = 3, 3
    return Outcomes(ids, ranks, answers, 1), Outcomes(ids, after_ranks, after_answers, 1)


def regressions() -> tuple[Regression, ...]:
    asked = fresh("vlm")
    answers = [item.answers[0] for item in asked.items()]
    worse = worst_answers(asked, (answers, np.ones(4)), ([f"not {answer}" for answer in answers], np.zeros(4)))
    suite = fresh("clip")
    return (*worse, *(each for view in (0, 1) for each in worst_items(Captions(), suite, *lost(view))))  # type: ignore[arg-type]


def verdict(worst: tuple[Regression, ...]) -> Verdict:
    hits = (np.random.default_rng(0).random((300, 2)) < 0.5).astype(float)
    suite = Suite(name="fresh.family", role="gain", task="retrieval")
    entries = [Scores(suite, outcomes(hits), outcomes(hits), outcomes(changed(hits, 90, 5)), 0.05, worst)]
    findings = decide(entries, level=0.03, loss_level=0.05, margin=0.05, min_items=50)
    outcome, reasons = conclude(findings, ())
    return Verdict(
        outcome=outcome, reasons=reasons, candidate="clip-0123456789ab", incumbent=None, base="tiny",
        suites=findings.results, gain=findings.gain, checks=(), alpha=0.05,
        look=AnalysisPlan(0.03, 0.05, 300).look(300), candidates=0, fresh=300, seconds=1.0,
        created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip


def test_a_report_holds_no_byte_of_a_sample(tmp_path: Path) -> None:
    worst = regressions()
    assert len(worst) == 12 and {each.view for each in worst} == {"answer", "image to text", "text to image"}
    ids = {row["id"] for row in rows()}
    assert {each.sample for each in worst} == ids
    assert {each.sample_before for each in worst if each.view != "answer"} < ids
    write_report(verdict(worst), tmp_path)
    thumbnails = [thumbnail(item) for item in fresh("clip").items()]
    needles = [*TEXTS, *QUESTIONS, *ANSWERS, *thumbnails, *(base64.b64encode(row["image"]).decode() for row in rows())]
    for file in tmp_path.iterdir():
        content = file.read_text()
        assert [needle for needle in needles if needle[:80] in content] == [], file.name
        assert all(name[:12] in content for name in ids), "it is named, to be looked up"


def test_samples_of_a_pair_are_named_and_filled_in_until_they_are_deleted() -> None:
    gone, there = rows()[0]["id"], rows()[1]
    pair = {"first": {"text": "", "thumbnail": "", "sample": gone},
            "second": {"text": "", "thumbnail": "", "sample": there["id"]}}  # fmt: skip
    folder = {"first": {"text": "a fox", "thumbnail": "data:", "sample": ""}, "second": pair["second"]}
    report = {"suites": [], "diagnostics": {"tail": None, "pairs": {"fresh.family": {"n": 9, "shown": [pair, folder]}}}}
    assert samples_of(report) == {gone, there["id"]}
    shown = with_samples(report, {there["id"]: there}, "/samples/{}.png")["diagnostics"]["pairs"]["fresh.family"]
    assert shown["n"] == 9 and [each["first"]["text"] for each in shown["shown"]] == [
        "a sample that was deleted", "a fox"
    ]  # fmt: skip
    assert shown["shown"][0]["second"] == {
        "text": TEXTS[1], "thumbnail": f"/samples/{there['id']}.png", "sample": there["id"]
    }  # fmt: skip


def test_an_item_of_a_folder_is_shown_in_the_report_itself(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.csv").write_text("file,text\n" + "".join(f"{n}.png,{TEXTS[n]}\n" for n in range(4)))
    for n in range(4):
        (folder / f"{n}.png").write_bytes(picture(n))
    (tmp_path / "known.yaml").write_text("task: retrieval\ndata: ${home}/data\n")
    [suite] = load_suites([tmp_path / "known.yaml"], tmp_path)
    worst = worst_items(Captions(), suite, *lost(1))  # type: ignore[arg-type]
    assert {each.text for each in worst} == set(TEXTS)
    assert all(each.thumbnail and each.answer_after in TEXTS and not each.sample for each in worst)


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """An update whose report names samples of the store."""
    monkeypatch.setattr(maintenance, "SETTLE_SECONDS", -1.0)
    monkeypatch.setattr("ops.console.data.STATUS_SECONDS", 0.0)
    made = console_settings(tmp_path)
    made = made.model_copy(update={"maintain": made.maintain.model_copy(update={"keep_seconds": 0.0})})
    put(SampleStore(made.lake), rows(), Position(TOPIC, 0, 4))
    ledger, artifacts = Ledger.open(made.ledger), Artifacts(made.artifacts)
    found = verdict(regressions())
    ledger.begin_update(
        NAME, family="clip", recipe={}, seed=0, store_version=1, data_from={}, data_to={}, incumbent=None
    )
    write_report(found, tmp_path / "made")
    for file in (tmp_path / "made").iterdir():
        artifacts.write_bytes(f"reports/{NAME}/{file.name}", file.read_bytes())
    ledger.advance_update(NAME, "trained", adapter="clip-0123456789ab")
    ledger.record_verdict(NAME, "clip-0123456789ab", found.outcome, f"reports/{NAME}", found.summary())
    ledger.advance_update(NAME, "done")
    ledger.close()
    return made


def test_the_console_shows_the_samples_of_a_report_until_they_are_deleted(installation: Settings) -> None:
    gone, kept = rows()[0], rows()[3]
    with TestClient(build_console(installation), base_url="http://127.0.0.1:8001") as visitor:
        page = visitor.get(f"/gate/{NAME}").text
        assert TEXTS[0] in page and QUESTIONS[0] in page and ANSWERS[0] in page and "that was deleted" not in page
        assert f"/samples/{gone['id']}.png?size=96" in page
        assert visitor.get(f"/samples/{gone['id']}.png?size=96").headers["content-type"] == "image/png"

        ledger = Ledger.open(installation.ledger)
        name = request_deletion(ledger, {"source": "cam"}, actor="ann", reason="asked to").id
        maintainer = Maintainer(installation, ledger)
        maintainer.run_once()
        deletion = ledger.deletion(name)
        assert deletion is not None and deletion.state == "done"
        maintainer.close()
        ledger.close()

        page = visitor.get(f"/gate/{NAME}").text
        assert TEXTS[3] in page and f"/samples/{kept['id']}.png?size=96" in page
        assert "a sample that was deleted" in page
        assert not [text for text in (TEXTS[0], TEXTS[1], QUESTIONS[0], ANSWERS[1]) if text in page]
        assert visitor.get(f"/samples/{gone['id']}.png?size=96").headers["content-type"] == "image/svg+xml"
    needles = [TEXTS[0].encode(), QUESTIONS[1].encode(), ANSWERS[0].encode(), gone["image"]]
    files = [file for file in installation.home.rglob("*") if file.is_file()]
    assert [file for file in files for needle in needles if needle in file.read_bytes()] == []
    assert any(json.dumps(gone["id"]).encode() in file.read_bytes() for file in files), "the report is there, with ids"
