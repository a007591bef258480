from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
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
from tests.unit.gate.builders import changed, fresh_suite, outcomes, picture, scores, suite_over
from tests.unit.ops.console.conftest import settings as console_settings
from updater.gate.decision import Scores, conclude, decide
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.report import render, render_body, samples_of, with_samples, write_report
from updater.gate.score import Outcomes, thumbnail, worst_answers, worst_items
from updater.gate.suites import Suite, load_suites
from updater.gate.verdict import (
    Check,
    Diagnostics,
    FeatureShift,
    Interval,
    PairAccuracy,
    PairImage,
    Regression,
    ShownPair,
    Tail,
    TailBin,
    TowerShift,
    Verdict,
    YesShare,
    diagnostics_lines,
)

EVIL = '<script>alert("x")</script> & "quoted"'


CHECKS = (Check("finite", True, "128 vectors are finite", 0.0, 0.01), Check("latency", True, "fine", float("nan")))


def verdict_of(*entries: Scores, **fields: Any) -> Verdict:
    findings = decide(entries, level=0.03, loss_level=0.05, margin=0.05, min_items=50)
    outcome, reasons = conclude(findings, CHECKS)
    made = Verdict(
        outcome=outcome, reasons=reasons, candidate="clip-0123456789ab", incumbent="clip-ba9876543210", base="shipped",
        suites=findings.results, gain=findings.gain, checks=CHECKS, alpha=0.05,
        look=AnalysisPlan(0.03, 0.05, 300, (100,)).look(250), candidates=3, fresh=250, seconds=41.25,
        created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return replace(made, **fields)


@pytest.fixture(scope="module")
def verdict() -> Verdict:
    before = (np.random.default_rng(0).random((300, 2)) < 0.5).astype(float)
    worst = (Regression("a1", EVIL, "image to text", 2, 40, "a dog", EVIL, "data:image/jpeg;base64,AAAA"),)
    kept = scores("emoji_retrieval", before, changed(before, 60, 5))
    new = scores("fresh.fluent3d", before, changed(before, 10, 80), role="gain")
    return verdict_of(
        replace(kept, chance=0.05, worst=worst), new,
        cost={"gflops_planned": 60000.0, "gflops_spent": 58211.4, "seconds": 231.2, "losses": [1.0, 0.5],
              "peak_bytes": 2.5e8},
        meta={"update": "u-1", "recipe": {"name": EVIL}, "data_from": {"t:0": 0}, "data_to": {"t:0": 812}},
    )  # fmt: skip


def test_both_files_are_written_and_say_the_same(verdict: Verdict, tmp_path: Path) -> None:
    write_report(verdict, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (report["outcome"], report["caught_by"]) == ("rejected", ["emoji_retrieval"])
    assert report["gain"]["strata"] == {"fresh.fluent3d": 300}
    assert report["checks"][1]["value"] is None, "NaN has no word in JSON"
    page = (tmp_path / "report.html").read_text()
    assert page == render(report), "an old report can be drawn again from its JSON"
    for text in ("Rejected", "emoji_retrieval", "fresh.fluent3d", "58,211 GFLOPs", "250 MB", "41.2 s", "candidate 4",
                 "number 2 at this candidate; 250 of 300 independent items", "with 300 items, if it is inconclusive",
                 "clip-ba9876543210", "Gain over all new data", "1/log2(2 + rank)", "recall@5"):  # fmt: skip
        assert text in page, text


def test_the_page_stands_alone_in_both_colour_schemes_and_captions_cannot_become_markup(verdict: Verdict) -> None:
    page = render(verdict.to_json())
    assert not re.findall(r"<(?:script|link|iframe)\b", page) and page.count("&lt;script&gt;") >= 3
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert "url(http" not in page and "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    references = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert len(ids) == len(set(ids)) and references and set(references) <= set(ids), "the two drawings share no id"
    assert "prefers-color-scheme: dark" in page and 'stroke="var(--bad)"' in page and "var(--good)" in page
    assert not re.findall(r"#0[1-7]0[1-7]0[1-7]", page), "every marker colour became a variable"
    body = render_body(verdict.to_json())
    assert "style=" not in body and "<style" not in body, "so that the console can forbid it"
    assert "emoji_retrieval" in body and "<svg" in body


def test_a_look_that_was_not_made_has_spent_nothing(verdict: Verdict) -> None:
    made = verdict.to_json()["look"]
    unmade = replace(verdict, spent=False).to_json()["look"]
    assert unmade["spent"] == made["before"] < made["spent"] and unmade["left"] > made["left"]
    assert unmade["left_for_others"] == made["left_for_others"], "the share was taken by the look before"
    first = replace(verdict, spent=False, look=AnalysisPlan(0.03, 0.05, 300).look(250)).to_json()["look"]
    assert first["spent"] == 0.0 and first["left_for_others"] > made["left_for_others"]


def test_a_verdict_without_suites_has_a_page_too(verdict: Verdict) -> None:
    page = render({**verdict.to_json(), "suites": [], "meta": {}, "cost": {}})
    assert "Engineering checks" in page and "Change per suite" not in page
    assert not any(words in page for words in ("how often a concept", "look alike", "Share of", "features moved"))
    assert list(diagnostics_lines(verdict.summary()["diagnostics"])) == []


def test_the_ledgers_summary_is_small_and_has_no_pictures(verdict: Verdict) -> None:
    summary = verdict.summary()
    text = json.dumps(summary)
    assert "base64" not in text and len(text) < 4000
    assert summary["caught_by"] == ["emoji_retrieval"]
    keys = {"before", "after", "ci", "decision", "n", "units", "role", "statistic", "recall"}
    assert set(summary["suites"]["fresh.fluent3d"]) >= keys
    gain = summary["gain"]
    assert (gain["decision"], gain["statistic"]["name"], gain["recall"]["name"]) == (
        "passed", "1/log2(2 + rank)", "recall@5",
    )  # fmt: skip


DIAGNOSTICS = Diagnostics(
    tail=Tail(
        2_000_000, 1_000_000,
        {"emoji_retrieval": (TailBin("never", 41, 40, Interval(0.5, 0.25, -0.25, -0.4, -0.1)),)},
    ),
    pairs={"emoji_retrieval": PairAccuracy(
        17, 0.1, Interval(0.7, 0.6, -0.1, -0.2, 0.05), 1, 3,
        (ShownPair(PairImage(EVIL, "data:image/jpeg;base64,BBBB"), PairImage("", "", "sample-of-store"), 0.987, True),),
    )},
    yes={"vqa_presence": YesShare(300, 0.5, 0.48, 0.52, 0.71)},
    shift=FeatureShift({"image": TowerShift(128, 0.0123, 0.0456, 31.5, 29.25)}, 0.81, 0.79),
    warnings=("vqa_presence: " + EVIL,),
)  # fmt: skip


def test_diagnostics_are_in_the_report_in_the_summary_and_on_a_terminal(verdict: Verdict) -> None:
    value = replace(verdict, diagnostics=DIAGNOSTICS)
    report = json.loads(json.dumps(value.to_json()))
    page = render(report)
    for text in ("estimated from 1,000,000", "41 items", "−25.0", "17 pairs", "sample sample-of-st", "0.987", "71.0",
                 "0.0123", "31.5 → 29.2", "0.810 → 0.790", "data:image/jpeg;base64,BBBB"):  # fmt: skip
        assert text in page, text
    assert "<script>" not in page and "Warning:" in page
    summary = value.summary()["diagnostics"]
    assert "BBBB" not in json.dumps(summary) and summary["pairs"]["emoji_retrieval"]["n"] == 17
    told = list(diagnostics_lines(summary))
    assert told == list(diagnostics_lines(report["diagnostics"]))
    for line in ("emoji_retrieval, concepts seen never (41 items): 50.0% -> 25.0% (-25.0 [-40.0, -10.0])",
                 "emoji_retrieval, 17 pairs that look alike: 70.0% -> 60.0% (-10.0 [-20.0, +5.0]), base 10.0%",
                 'vqa_presence, share of "yes": 52.0% -> 71.0%; truth 50.0%, base 48.0%',
                 "modality gap 0.810 -> 0.790"):  # fmt: skip
        assert line in told
    assert told[0].startswith("warning: vqa_presence")


def test_a_question_is_shown_with_its_answers_before_and_after() -> None:
    before = (np.random.default_rng(0).random((300, 1)) < 0.7).astype(float)
    worst = (Regression("a1", EVIL, "answer", 0, 1, "red", "", "data:image/jpeg;base64,AAAA", "red, crimson"),)
    first, after = outcomes(before), outcomes(changed(before, 60, 5))
    suite = suite_over(before, "vqa_colour", "retention", "vqa")
    page = render(verdict_of(Scores(suite, first, first, after, 0.3, worst, np.arange(300))).to_json())
    for text in ("red → nothing", "right: red, crimson", "exact_match", "chance 30.0"):
        assert text in page
    assert "<script>" not in page and "rank 1" not in page


# Samples of the store: named in the report, and read from the store where it is shown


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
    """All correct before, then all of one view wrong: the last choice is the answer."""
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


def with_regressions(worst: tuple[Regression, ...]) -> Verdict:
    hits = (np.random.default_rng(0).random((300, 2)) < 0.5).astype(float)
    suite = Suite(name="fresh.family", role="gain", task="retrieval")
    return verdict_of(Scores(suite, outcomes(hits), outcomes(hits), outcomes(changed(hits, 90, 5)), 0.05, worst))


def test_a_report_holds_no_byte_of_a_sample(tmp_path: Path) -> None:
    worst = regressions()
    assert len(worst) == 12 and {each.view for each in worst} == {"answer", "image to text", "text to image"}
    ids = {row["id"] for row in rows()}
    assert {each.sample for each in worst} == ids
    assert {each.sample_before for each in worst if each.view != "answer"} < ids
    write_report(with_regressions(worst), tmp_path)
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
    found = with_regressions(regressions())
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
