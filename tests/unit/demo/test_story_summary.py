"""The demo's end: one JSON line with every figure, and an honest list of what was not as promised."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from core.ledger import GateOutcome, VerdictRow
from demo.story.summary import Facts, Lesson, as_json, broken_promises, show


def _verdict(outcome: GateOutcome, retention: str, gain: str = "passed") -> VerdictRow:
    def suite(role: str, decision: str) -> dict[str, object]:
        return {
            "role": role, "metric": "recall@5", "n": 200, "base": 0.5, "before": 0.5, "after": 0.6, "ci": [0.02, 0.18],
            "decision": decision,
        }  # fmt: skip

    caught = ["emoji"] if retention == "failed" else []
    summary = {"suites": {"emoji": suite("retention", retention), "fresh": suite("gain", gain)}, "caught_by": caught}
    return VerdictRow(update_id="u1", adapter="clip-a", outcome=outcome, report_key="reports/u1", summary=summary)


def _lesson() -> Lesson:
    return Lesson(
        naive=_verdict("rejected", "failed"), default=_verdict("passed", "passed"), prepare_seconds=1.0,
        commit_seconds=0.01, rollback_seconds=0.05, budget={"planned": 10.0, "spent": 9.0}, report="report.html",
    )  # fmt: skip


def _facts() -> Facts:
    return Facts(
        release=4, clip=_lesson(), vlm=_lesson(), requests=100, vlm_requests=33, failed=0, mixed=0,
        event_to_searchable_seconds=2.0, seconds=500.0,
    )  # fmt: skip


def test_the_last_line_is_json_with_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    show(_facts())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["naive_verdict"] == "rejected"
    assert last["naive_caught_by"] == ["emoji"]
    assert last["suites"]["fresh"] == {
        "role": "gain", "before": 0.5, "after": 0.6, "ci": [0.02, 0.18], "decision": "passed",
    }  # fmt: skip
    assert (last["failed"], last["mixed"], last["budget"]) == (0, 0, {"planned": 10.0, "spent": 9.0})
    assert last["vlm"]["naive_caught_by"] == ["emoji"]
    assert last["vlm_requests"] == 33
    assert broken_promises(_facts()) == []


def test_the_line_before_the_last_says_where_the_time_went(capsys: pytest.CaptureFixture[str]) -> None:
    show(replace(_facts(), first_search_seconds=51.26, chapters={"start": 31.02, "stream": 20.5}, page="demo.html"))
    times = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert times == {"first_search_seconds": 51.3, "chapters": {"start": 31.0, "stream": 20.5}, "page": "demo.html"}


def test_without_the_vlm_nothing_is_promised_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    facts = replace(_facts(), vlm=None, vlm_requests=0)
    assert broken_promises(facts) == []
    show(facts)
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last.keys() == as_json(_facts()).keys()
    assert (last["vlm"], last["vlm_requests"]) == (None, 0)
    assert "The VLM loop" not in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"failed": 1}, "1 of 100 requests failed"),
        ({"requests": 0}, "0 of 0 requests"),
        ({"vlm_requests": 0}, "(0 were to the VLM)"),
        ({"mixed": 2}, "2 answers"),
    ],
)
def test_a_promise_about_requests_that_was_not_kept_is_named(change: dict[str, int], words: str) -> None:
    assert any(words in promise for promise in broken_promises(replace(_facts(), **change)))


@pytest.mark.parametrize("family", ["clip", "vlm"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"naive": _verdict("passed", "passed")}, "naive update was passed"),
        ({"default": _verdict("inconclusive", "inconclusive")}, "default update was inconclusive"),
        ({"default": _verdict("passed", "passed", gain="inconclusive")}, "no gain suite"),
        ({"rollback_seconds": 1.5}, "rollback took 1.50 s"),
    ],
)
def test_a_promise_about_a_model_that_was_not_kept_is_named(family: str, change: dict[str, Any], words: str) -> None:
    facts = replace(_facts(), **{family: replace(_lesson(), **change)})
    assert any(words in promise and family.upper() in promise for promise in broken_promises(facts))
