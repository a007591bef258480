"""What callers say of answers, in the ledger and on the command line."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError, FeedbackRefused
from core.ledger import Ledger, feedback
from core.ledger.rows import FeedbackRow, utc_now
from core.loading import load_settings
from tests.support.command_line import ratchet
from tests.support.inputs import pictures


def row(number: int = 0, **fields: Any) -> FeedbackRow:
    own = {"caller": "app", "release": 3, "route": "classify", "verdict": "wrong", "detail": {}, **fields}
    return FeedbackRow(id=f"{number:064x}", input="0" * 32, answered_at=utc_now(), **own)


def test_what_is_sent_many_times_at_once_is_one_row_and_one_event(ledger: Ledger) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: ledger.record_feedback(row(detail={"comment": "no"})), range(8)))
    assert sum(new for _, new in answers) == 1
    assert {recorded.created_at for recorded, _ in answers} == {ledger.feedback()[0].created_at}
    assert ledger.count_waiting_events() == 1
    with pytest.raises(FeedbackRefused, match="you said 'wrong' of this answer"):
        ledger.record_feedback(row(detail={"comment": "yes"}))


def test_a_caller_may_say_so_much_a_day_others_as_well_and_old_feedback_is_removed(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feedback, "PER_DAY", 2)
    old = utc_now() - timedelta(days=2)
    for number, created in enumerate((old, utc_now(), utc_now())):
        ledger.record_feedback(row(number, created_at=created))
    with pytest.raises(FeedbackRefused, match="app has given feedback on 2 answers"):
        ledger.record_feedback(row(3))
    ledger.record_feedback(row(4, caller="other", release=2))
    assert [each["count"] for each in ledger.feedback_counts()] == [3, 1]
    assert ledger.prune_feedback(utc_now() - timedelta(days=1)) == 1
    assert [each.caller for each in ledger.feedback()] == ["other", "app", "app"]


def test_it_is_listed_and_counted(tmp_path: Path) -> None:
    with closing(Ledger.open(load_settings(None, {"home": tmp_path}, environ={}).ledger)) as ledger:
        ledger.record_feedback(row(0))
        ledger.record_feedback(row(1, caller="b", verdict="correct", detail={"label": "bus"}))
        ledger.record_feedback(row(3, detail={"label": "car"}, state="waiting", image=pictures(1)[0]))
        ledger.record_feedback(row(2, release=2, route="search", verdict="chosen", detail={"position": 0}))
    shown = ratchet(tmp_path, "feedback", "list", "--verdict", "correct").output
    assert "label: bus" in shown and "app" not in shown
    listed = json.loads(ratchet(tmp_path, "feedback", "list", "--release", "2", "--json").output)
    assert [(each["route"], each["detail"]) for each in listed] == [("search", {"position": 0})]
    table = [line.split() for line in ratchet(tmp_path, "feedback", "stats").output.splitlines()]
    assert ["│", "3", "│", "classify", "│", "0", "│", "2", "│", "1", "│", "0", "│"] in table
    assert len(json.loads(ratchet(tmp_path, "feedback", "stats", "--json").output)) == 3
    done = ratchet(tmp_path, "feedback", "list", "--waiting", "--out", str(tmp_path / "images"))
    assert "label: car" in done.output
    assert (tmp_path / "images" / "00000000.png").read_bytes() == pictures(1)[0]
    done = ratchet(tmp_path, "feedback", "dismiss", f"{3:064x}", "--reason", "another car")
    assert "00000000 of app is dismissed" in done.output
    with pytest.raises(ConfigError, match="--verdict: there is no 'bad'"):
        ratchet(tmp_path, "feedback", "list", "--verdict", "bad")
