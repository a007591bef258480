"""The report: complete, self-contained, safe with captions from outside."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.unit.gate.builders import changed, outcomes, scores, suite_over
from updater.gate.decision import Scores, conclude, decide
from updater.gate.interim_analyses import AnalysisPlan
from updater.gate.report import render, render_body, write_report
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


def verdict(lost: int = 60) -> Verdict:
    before = (np.random.default_rng(0).random((300, 2)) < 0.5).astype(float)
    worst = (Regression("a1", EVIL, "image to text", 2, 40, "a dog", EVIL, "data:image/jpeg;base64,AAAA"),)
    first = scores("emoji_retrieval", before, changed(before, lost, 5))
    second = scores("fresh.fluent3d", before, changed(before, 10, 80), role="gain")
    entries = [type(first)(first.suite, first.base, first.before, first.after, 0.05, worst), second]
    findings = decide(entries, level=0.03, loss_level=0.05, margin=0.05, min_items=50)
    checks = (Check("finite", True, "128 vectors are finite", 0.0, 0.01), Check("latency", True, "fine", float("nan")))
    outcome, reasons = conclude(findings, checks)
    return Verdict(
        outcome=outcome,
        reasons=reasons,
        candidate="clip-0123456789ab",
        incumbent="clip-ba9876543210",
        base="shipped",
        suites=findings.results,
        gain=findings.gain,
        checks=checks,
        alpha=0.05,
        look=AnalysisPlan(0.03, 0.05, 300, (100,)).look(250),
        candidates=3,
        fresh=250,
        seconds=41.25,
        created_at="2026-01-01T00:00:00+00:00",
        cost={
            "gflops_planned": 60000.0,
            "gflops_spent": 58211.4,
            "seconds": 231.2,
            "losses": [1.0, 0.5],
            "peak_bytes": 2.5e8,
        },
        meta={"update": "u-1", "recipe": {"name": EVIL}, "data_from": {"t:0": 0}, "data_to": {"t:0": 812}},
    )


def test_both_files_are_written_and_say_the_same(tmp_path: Path) -> None:
    value = verdict()
    write_report(value, tmp_path / "r")
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["report.html", "report.json"]
    report = json.loads((tmp_path / "r" / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["outcome"] == "rejected"
    assert report["caught_by"] == ["emoji_retrieval"]
    assert report["gain"]["strata"] == {"fresh.fluent3d": 300}
    assert report["checks"][1]["value"] is None, "NaN has no word in JSON"
    page = (tmp_path / "r" / "report.html").read_text()
    assert page == render(report), "an old report can be drawn again from its JSON"
    for text in (
        "Rejected",
        "emoji_retrieval",
        "fresh.fluent3d",
        "58,211 GFLOPs",
        "250 MB",
        "41.2 s",
        "number 2 at this candidate; 250 of 300 independent items",
        "with 300 items, if it is inconclusive",
        "candidate 4",
        "clip-ba9876543210",
        "Gain over all new data",
        "1/log2(2 + rank)",
        "recall@5",
    ):
        assert text in page


def test_the_page_stands_alone_and_captions_cannot_become_markup() -> None:
    page = render(verdict().to_json())
    assert not re.findall(r"<(?:script|link|iframe)\b", page) and page.count("&lt;script&gt;") >= 3
    sources = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
    assert sources and all(source.startswith(("data:image/jpeg;base64,", "#")) for source in sources)
    assert "url(http" not in page and "@import" not in page


def test_ids_of_the_two_drawings_do_not_collide_and_one_drawing_serves_both_colour_schemes() -> None:
    page = render(verdict().to_json())
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = re.findall(r'href="#([^"]+)"', page) + re.findall(r"url\(#([^)]+)\)", page)
    assert references and set(references) <= set(ids)
    assert "prefers-color-scheme: dark" in page
    assert 'stroke="var(--bad)"' in page and "var(--good)" in page
    assert not re.findall(r"#0[1-7]0[1-7]0[1-7]", page), "every marker colour became a variable"
    body = render_body(verdict().to_json())
    assert "style=" not in body and "<style" not in body, "so that the console can forbid it"
    assert "emoji_retrieval" in body and "<svg" in body


def test_a_look_that_was_not_made_has_spent_nothing() -> None:
    made = verdict().to_json()["look"]
    unmade = replace(verdict(), spent=False).to_json()["look"]
    assert unmade["spent"] == made["before"] < made["spent"]
    assert unmade["left"] > made["left"]
    assert unmade["left_for_others"] == made["left_for_others"], "the share was taken by the look before"
    first = replace(verdict(), spent=False, look=AnalysisPlan(0.03, 0.05, 300).look(250)).to_json()["look"]
    assert first["spent"] == 0.0 and first["left_for_others"] > made["left_for_others"]


def test_a_verdict_without_suites_has_a_page_too() -> None:
    value = verdict().to_json()
    page = render({**value, "suites": [], "checks": [{**value["checks"][0], "ok": False}], "meta": {}, "cost": {}})
    assert "Engineering checks" in page and "Change per suite" not in page


def test_the_ledgers_summary_is_small_and_has_no_pictures() -> None:
    text = json.dumps(verdict().summary())
    assert "base64" not in text and len(text) < 4000
    summary = verdict().summary()
    assert summary["caught_by"] == ["emoji_retrieval"]
    keys = {"before", "after", "ci", "decision", "n", "units", "role", "statistic", "recall"}
    assert set(summary["suites"]["fresh.fluent3d"]) >= keys
    assert summary["gain"]["statistic"]["name"] == "1/log2(2 + rank)" and summary["gain"]["decision"] == "passed"
    assert summary["gain"]["recall"]["name"] == "recall@5"


BESIDE = Diagnostics(
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


def test_what_is_told_beside_is_in_the_report_in_the_summary_and_on_a_terminal() -> None:
    value = replace(verdict(), diagnostics=BESIDE)
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


def test_a_verdict_with_nothing_beside_says_nothing_of_it() -> None:
    value = verdict()
    page = render(value.to_json())
    assert not any(words in page for words in ("how often a concept", "look alike", "Share of", "features moved"))
    assert list(diagnostics_lines(value.summary()["diagnostics"])) == []


def test_a_question_is_shown_with_its_answers_before_and_after() -> None:
    before = (np.random.default_rng(0).random((300, 1)) < 0.7).astype(float)
    worst = (Regression("a1", EVIL, "answer", 0, 1, "red", "", "data:image/jpeg;base64,AAAA", "red, crimson"),)
    suite = suite_over(before, "vqa_colour", "retention", "vqa")
    first = outcomes(before)
    findings = decide(
        [Scores(suite, first, first, outcomes(changed(before, 60, 5)), 0.3, worst, np.arange(300))],
        level=0.03, loss_level=0.05, margin=0.05, min_items=50,
    )  # fmt: skip
    page = render(replace(verdict(), suites=findings.results, gain=None, candidate="vlm-0123456789ab").to_json())
    assert "red → nothing" in page and "right: red, crimson" in page
    assert "exact_match" in page and "chance 30.0" in page and "<script>" not in page
    assert "rank 1" not in page
