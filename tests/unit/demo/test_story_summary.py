from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from demo.story.summary import as_json, broken_promises, show
from tests.unit.demo.builders import facts, lesson, verdict

FACTS = facts(lesson(), lesson(), vlm_requests=33)


def test_the_last_line_is_json_with_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    show(FACTS)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["naive_verdict"] == "rejected"
    assert last["naive_caught_by"] == ["emoji"]
    assert last["suites"]["fresh.new"] == {
        "role": "gain", "before": 0.5, "after": 0.6, "ci": [0.02, 0.18], "decision": "passed",
    }  # fmt: skip
    assert (last["failed"], last["mixed"], last["budget"]) == (0, 0, {"planned": 10.0, "spent": 9.0})
    assert last["vlm"]["naive_caught_by"] == ["emoji"]
    assert last["vlm_requests"] == 33
    assert broken_promises(FACTS) == []


def test_the_line_before_the_last_says_where_the_time_went(capsys: pytest.CaptureFixture[str]) -> None:
    show(replace(FACTS, first_search_seconds=51.26, chapters={"start": 31.02, "stream": 20.5}, page="demo.html"))
    times = json.loads(capsys.readouterr().out.splitlines()[-2])
    assert times == {"first_search_seconds": 51.3, "chapters": {"start": 31.0, "stream": 20.5}, "page": "demo.html"}


def test_without_the_vlm_nothing_is_promised_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    changed = replace(FACTS, vlm=None, vlm_requests=0)
    assert broken_promises(changed) == []
    show(changed)
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    assert last.keys() == as_json(FACTS).keys()
    assert (last["vlm"], last["vlm_requests"]) == (None, 0)
    assert "The VLM loop" not in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"failed": 1}, "1 of 1234 requests failed"),
        ({"requests": 0}, "0 of 0 requests"),
        ({"vlm_requests": 0}, "(0 were to the VLM)"),
        ({"mixed": 2}, "2 answers"),
    ],
)
def test_a_promise_about_requests_that_was_not_kept_is_named(change: dict[str, int], words: str) -> None:
    assert any(words in promise for promise in broken_promises(replace(FACTS, **change)))


@pytest.mark.parametrize("family", ["clip", "vlm"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"naive": verdict("passed", "passed")}, "naive update was passed"),
        ({"default": verdict("inconclusive", "inconclusive")}, "default update was inconclusive"),
        ({"default": verdict("passed", "passed", gain="inconclusive")}, "no gain suite"),
        ({"rollback_seconds": 1.5}, "rollback took 1.50 s"),
    ],
)
def test_a_promise_about_a_model_that_was_not_kept_is_named(family: str, change: dict[str, Any], words: str) -> None:
    changed = replace(FACTS, **{family: replace(lesson(), **change)})
    assert any(words in promise and family.upper() in promise for promise in broken_promises(changed))
