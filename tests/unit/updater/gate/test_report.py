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
from tests.unit.ops.console.conftest import settings as console_settings
from tests.unit.updater.gate.builders import changed, fresh_suite, outcomes, picture, scores
from updater.gate import verdict as v
from updater.gate.decision import Scores, conclude, decide
from updater.gate.interim_analyses import AnalysisPlan, candidate_alpha
from updater.gate.report import render, render_body, write_report
from updater.gate.score import Outcomes, thumbnail, worst_answers, worst_items
from updater.gate.suites import Suite

EVIL = '<script>alert("x")</script> & "quoted"'


CHECKS = (v.Check("finite", True, "128 vectors are finite", 0.0, 0.01), v.Check("latency", True, "fine", float("nan")))


def verdict_of(*entries: Scores, **fields: Any) -> v.Verdict:
    findings = decide(entries, level=0.03, loss_level=0.05, margin=0.05, mean_margin=0.015, min_items=50)
    outcome, reasons = conclude(findings, CHECKS)
    made = v.Verdict(
        outcome=outcome, reasons=reasons, candidate="clip-0123456789ab", incumbent="clip-ba9876543210", base="shipped",
        suites=findings.results, gain=findings.gain, mean=findings.mean, checks=CHECKS, alpha=0.05,
        look=AnalysisPlan(0.03, 0.05, 300, (100,)).look(250), candidates=3, fresh=250, seconds=41.25,
        created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return replace(made, **fields)


DIAGNOSTICS = v.Diagnostics(
    tail=v.Tail(
        2_000_000, 1_000_000,
        {"emoji_retrieval": (v.TailBin("never", 41, 40, v.Interval(0.5, 0.25, -0.25, -0.4, -0.1)),)},
    ),
    pairs={"emoji_retrieval": v.PairAccuracy(
        17, 0.1, v.Interval(0.7, 0.6, -0.1, -0.2, 0.05), 1, 3,
        (v.ShownPair(v.PairImage(EVIL, "data:image/jpeg;base64,B"), v.PairImage("", "", "sample-of-it"), 0.987, True),),
    )},
    yes={"vqa_presence": v.YesShare(300, 0.5, 0.48, 0.52, 0.71)},
    shift=v.FeatureShift({"image": v.TowerShift(128, 0.0123, 0.0456, 31.5, 29.25)}, 0.81, 0.79),
    warnings=("vqa_presence: " + EVIL,),
)  # fmt: skip


TRUST = (
    v.SourceAgreement("fresh.fluent3d", EVIL, 1, 210, 205, 0.098, 0.101, 0.61, False, 0.455, 0.0001, True, "look"),
    v.SourceAgreement("fresh.fluent3d", "", 7, 90, 88, 0.455, 0.101, 0.0001, True, 0.098, 1.0),
)


@pytest.fixture(scope="module")
def verdict() -> v.Verdict:
    before = (np.random.default_rng(0).random((300, 2)) < 0.5).astype(float)
    worst = (v.Regression("a1", EVIL, "image to text", 2, 40, "a dog", EVIL, "data:image/jpeg;base64,AAAA"),)
    kept = scores("emoji_retrieval", before, changed(before, 60, 5))
    new = scores("fresh.fluent3d", before, changed(before, 10, 80), role="gain")
    asked = Suite.model_validate({"name": "vqa_colour", "role": "retention", "task": "vqa"})
    answers = outcomes(before[:, :1])
    lost = (v.Regression("a2", EVIL, "answer", 0, 1, "red", "", "data:image/jpeg;base64,AAAA", "red, crimson"),)
    return verdict_of(
        replace(kept, chance=0.05, worst=worst), new, Scores(asked, answers, answers, answers, 0.3, lost),
        trust=TRUST, cost={"gflops_planned": 60000.0, "gflops_spent": 58211.4, "seconds": 231.2, "losses": [1.0, 0.5],
              "peak_bytes": 2.5e8, "full_bytes": 1e9, "row_bytes": 45708.1, "closing": 0},
        meta={"update": "u-1", "recipe": {"name": EVIL}, "data_from": {"t:0": 0}, "data_to": {"t:0": 812}},
        diagnostics=DIAGNOSTICS,
    )  # fmt: skip


def test_both_files_are_written_and_say_the_same(verdict: v.Verdict, tmp_path: Path) -> None:
    write_report(verdict, tmp_path)
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert (report["outcome"], report["caught_by"]) == ("rejected", ["emoji_retrieval", v.MEAN])
    assert report["gain"]["strata"] == {"fresh.fluent3d": 300}
    assert report["checks"][1]["value"] is None, "NaN has no word in JSON"
    page = (tmp_path / "report.html").read_text()
    assert page == render(report), "an old report can be drawn again from its JSON"
    assert not re.search(r">(?:Full|Peak|Row|Closing|Bytes)<", page), "fields' names are not labels"
    for text in ("Rejected", "emoji_retrieval", "fresh.fluent3d", "58,211 GFLOPs", "250 MB", "41.2 s", "candidate 4",
                 "2026-01-01 00:00 UTC",
                 "number 2 at this candidate; 250 of 300 independent items", "with 300 items, if it is inconclusive",
                 "clip-ba9876543210", "Gain over all new data", "1/log2(2 + rank)", "recall@5",
                 "red → nothing", "right: red, crimson", "exact_match", "chance 30.0",
                 "estimated from 1,000,000", "41 items", "−25.0", "17 pairs", "sample sample-of-it", "0.987", "71.0",
                 "9.8", "10.1", "base agrees less", "7 small ones", "held",
                 "0.0123", "31.5 → 29.2", "0.810 → 0.790", "data:image/jpeg;base64,B", "Warning:"):  # fmt: skip
        assert text in page, text


def test_the_page_stands_alone_in_both_colour_schemes_and_captions_cannot_become_markup(verdict: v.Verdict) -> None:
    page, body = render(verdict.to_json()), render_body(verdict.to_json())
    assert not re.findall(r"<(?:script|link|iframe)\b", page) and page.count("&lt;script&gt;") >= 5
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert "url(http" not in page and "@import" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    references = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert len(ids) == len(set(ids)) and references and set(references) <= set(ids), "the two drawings share no id"
    assert "prefers-color-scheme: dark" in page and 'stroke="var(--bad)"' in page and "var(--good)" in page
    assert not re.findall(r"#0[1-7]0[1-7]0[1-7]", page), "every marker colour became a variable"
    assert "style=" not in body and "<style" not in body, "so that the console can forbid it"
    assert "emoji_retrieval" in body and "<svg" in body and "How to read this verdict" in body
    bare = render(
        {**replace(verdict, diagnostics=v.Diagnostics(), trust=()).to_json(), "suites": [], "meta": {}, "cost": {}}
    )
    assert "Engineering checks" in bare
    absent = (
        "How to read",
        "Change per suite",
        "Where the new labels",
        "how often a concept",
        "look alike",
        "Share of",
        "features moved",
    )
    assert not [words for words in absent if words in bare]


def test_the_mean_loss_and_earlier_judgements_are_shown_where_the_report_has_them(verdict: v.Verdict) -> None:
    suites = (replace(verdict.suites[0], used=7), *verdict.suites[1:])
    assert verdict.mean is not None
    base = v.Change("the base", 0.5, 0.45, -0.05, -0.075, -0.025, 0.2)
    mean_loss = replace(verdict.mean, references={**verdict.mean.references, "the base": base})
    report = json.loads(json.dumps(replace(verdict, suites=suites, mean=mean_loss).to_json()))
    page = " ".join(render(report).split())
    mean = report["mean"]
    card = page[page.index("Mean loss over the retention suites") :]
    assert mean["decision"] == "failed" and '<span class="pill failed">failed</span>' in card[:100]
    assert "A loss of 1.5 points must be excluded" in card
    assert set(mean["references"]) == {"the incumbent", "the base"}
    for name, change in mean["references"].items():
        assert f'<strong>{name}</strong></td><td class="n">{100 * change["before"]:.1f}</td>' in card
    assert f"{mean['reason']} ({mean['n']:,} items of 2 suites)" in page
    assert page.count("earlier judgement") == page.count("used for 7 earlier judgements") == 1
    assert ">mean loss<" in page, "a row of the drawing"
    del report["mean"]
    for suite in report["suites"]:
        del suite["used"]
    old = render(report)
    assert "Gain over all new data" in old
    assert not [words for words in ("Mean loss over", "earlier judgement", ">mean loss<") if words in old]


def test_a_look_that_was_not_made_has_spent_nothing(verdict: v.Verdict) -> None:
    made = verdict.to_json()["look"]
    unmade = replace(verdict, spent=False).to_json()["look"]
    assert unmade["spent"] == made["before"] < made["spent"] and unmade["left"] > made["left"]
    assert unmade["left_for_others"] == made["left_for_others"], "the share was taken by the look before"
    last = replace(verdict, look=AnalysisPlan(candidate_alpha(0.05, 1), 0.05, 225).look(225)).to_json()["look"]
    assert (last["spent"], last["left"]) == (last["alpha"], 0.0), "all is spent, to the last digit"
    first = replace(verdict, spent=False, look=AnalysisPlan(0.03, 0.05, 300).look(250)).to_json()["look"]
    assert first["spent"] == 0.0 and first["left_for_others"] > made["left_for_others"]


def test_the_ledgers_summary_is_small_without_pictures_and_is_told_on_a_terminal(verdict: v.Verdict) -> None:
    summary = verdict.summary()
    text = json.dumps(summary)
    assert "base64" not in text and len(text) < 6000 and summary["caught_by"] == ["emoji_retrieval", v.MEAN]
    keys = {"before", "after", "ci", "decision", "n", "units", "role", "statistic", "recall"}
    assert set(summary["suites"]["fresh.fluent3d"]) >= keys
    gain = summary["gain"]
    names = gain["decision"], gain["statistic"]["name"], gain["recall"]["name"]
    assert names == ("passed", "1/log2(2 + rank)", "recall@5")
    told = list(v.diagnostics_lines(summary["diagnostics"]))
    assert told == list(v.diagnostics_lines(verdict.to_json()["diagnostics"]))
    for line in ("emoji_retrieval, concepts seen never (41 items): 50.0% -> 25.0% (-25.0 [-40.0, -10.0])",
                 "emoji_retrieval, 17 pairs that look alike: 70.0% -> 60.0% (-10.0 [-20.0, +5.0]), base 10.0%",
                 'vqa_presence, share of "yes": 52.0% -> 71.0%; truth 50.0%, base 48.0%',
                 "modality gap 0.810 -> 0.790"):  # fmt: skip
        assert line in told
    assert told[0].startswith("warning: vqa_presence")


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


def regressions() -> tuple[v.Regression, ...]:
    asked, suite = fresh("vlm"), fresh("clip")
    answers = [item.answers[0] for item in asked.items()]
    worse = worst_answers(asked, (answers, np.ones(4)), ([f"not {answer}" for answer in answers], np.zeros(4)))
    return (*worse, *(each for view in (0, 1) for each in worst_items(Captions(), suite, *lost(view))))  # type: ignore[arg-type]


def with_regressions(worst: tuple[v.Regression, ...]) -> v.Verdict:
    """A verdict that shows samples: the worst ones, and a pair of them."""
    hits = (np.random.default_rng(0).random((300, 2)) < 0.5).astype(float)
    suite = Suite(name="fresh.family", role="gain", task="retrieval")
    pair = v.ShownPair(*(v.PairImage("", "", rows()[n]["id"]) for n in (0, 3)), 0.99, True)
    pairs = {"fresh.family": v.PairAccuracy(9, 0.1, v.Interval(0.5, 0.5, 0.0, 0.0, 0.0), 0, 0, (pair,))}
    given = Scores(suite, outcomes(hits), outcomes(hits), outcomes(changed(hits, 90, 5)), 0.05, worst)
    return verdict_of(given, diagnostics=v.Diagnostics(pairs=pairs))


def test_a_report_holds_no_byte_of_a_sample(tmp_path: Path) -> None:
    worst, ids = regressions(), {row["id"] for row in rows()}
    assert len(worst) == 12 and {each.view for each in worst} == {"answer", "image to text", "text to image"}
    assert {each.sample for each in worst} == ids
    assert {each.sample_before for each in worst if each.view != "answer"} < ids
    write_report(with_regressions(worst), tmp_path)
    thumbnails = [thumbnail(item) for item in fresh("clip").items()]
    needles = [*TEXTS, *QUESTIONS, *ANSWERS, *thumbnails, *(base64.b64encode(row["image"]).decode() for row in rows())]
    for file in tmp_path.iterdir():
        content = file.read_text()
        assert [needle for needle in needles if needle[:80] in content] == [], file.name
        assert all(name[:12] in content for name in ids), "it is named, to be looked up"


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
    nothing: dict[str, Any] = {"recipe": {}, "data_from": {}, "data_to": {}}
    ledger.begin_update(NAME, family="clip", seed=0, store_version=1, incumbent=None, **nothing)
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
