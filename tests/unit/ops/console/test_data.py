from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from core.errors import StoreUnavailable
from ops.console import data as data_module
from ops.console.app import build_console
from ops.console.data import ConsoleData, short_texts
from ops.console.pages.overview import backfills, problems
from ops.console.template_filters import ago, duration, number, pairs, percent, points
from streams.store.rows import SampleTable
from tests.unit.ops.console.conftest import LOCAL, settings


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


def test_a_store_that_hangs_is_a_page_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "PATIENCE_SECONDS", 0.5)
    answers = threading.Event()
    monkeypatch.setattr(SampleTable, "open", lambda *_: answers.wait(60))
    try:
        with TestClient(build_console(settings(tmp_path)), base_url=LOCAL) as visitor:
            for path in ("/", "/stream"):
                page = visitor.get(path)
                assert page.status_code == 503 and "Store: slow" in page.text
    finally:
        answers.set()


def test_a_store_that_refuses_is_told_from_one_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreUnavailable("the bucket does not exist.", "Make it.", "refused")

    monkeypatch.setattr(SampleTable, "open", refuse)
    with TestClient(build_console(settings(tmp_path)), base_url=LOCAL) as visitor:
        page = visitor.get("/stream").text
    assert "Store: refused" in page and "the bucket does not exist." in page


def test_what_is_not_well_is_said_in_words() -> None:
    assert problems(None) == ["The model server does not answer."]
    assert problems(status(live=1.0, next_one=0.04)) == [], "an index that is not live yet is no trouble"
    assert "93% of the pictures" in problems(status(live=0.93))[0]
    assert "because" in problems(status(trouble="because"))[0]
    assert "the VLM is starting" in problems({**status(), "vlm_problem": "the VLM is starting."})[0]


def test_a_backfill_for_the_next_release_is_shown_with_its_estimate() -> None:
    assert backfills(None) == backfills(status()) == []
    waiting = status(next_one=0.25)
    assert backfills(waiting) == ["The pictures are being prepared for the next release: 25%."]
    waiting["catalog"]["spaces"]["b"]["seconds_left"] = 9000.0
    assert backfills(waiting)[0].endswith("25%, about 2.5 h more.")


def status(live: float = 1.0, next_one: float = 1.0, trouble: str = "") -> dict[str, Any]:
    rows = [{"release": 2, "image_space": "a"}, {"release": 1, "image_space": "old"}]
    spaces = {"a": {"coverage": live}, "b": {"coverage": next_one}}
    return {"controller": {"started": True, "trouble": trouble, "resident": rows}, "catalog": {"spaces": spaces}}


def test_suggestions_are_short_and_each_is_given_once() -> None:
    rows = [{"text": word} for word in ("", "a cat", "a cat", "x" * 41, " a dog ")]
    assert short_texts(rows) == ["a cat", "a dog"]


def test_numbers_are_written_for_people() -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    assert [ago(now - timedelta(seconds=s), now) for s in (1, 61, 7200)] == ["just now", "1 minute ago", "2 hours ago"]
    words = [duration(seconds) for seconds in (None, 0.02, 3.0, 100, 600, 9000)]
    assert words == ["–", "20 ms", "3.0 s", "100 s", "10 min", "2.5 h"]
    assert (number(5801.5), number(0.25), points(-0.05), percent(0.5), pairs({"a": 1, "b": None})) == (
        "5,802", "0.2", "−5.0", "50%", "a 1",
    )  # fmt: skip
