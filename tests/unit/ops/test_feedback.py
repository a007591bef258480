"""What callers say of answers, in the ledger and on the command line."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError, FeedbackRefused, LedgerError
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


def test_an_edit_replaces_what_the_caller_said_and_the_same_report_is_still_the_same(ledger: Ledger) -> None:
    said = {"label": "buss", "text": "a bus", "comment": "look", "position": 0}

    def report() -> FeedbackRow:
        return row(verdict="correct", detail=said, state="waiting", image=b"image")

    ledger.record_feedback(report())
    edited = ledger.review_correction("0" * 8, True, actor="ann", reason="seen", label="bus", text="")
    assert (edited.state, edited.verdict) == ("accepted", "correct")
    assert edited.detail == {"label": "bus", "comment": "look", "position": 0, "said": said}
    (noted,) = ledger.audit_rows(actor="ann")
    assert noted.detail == {"reason": "seen", "label": "bus", "text": "", "said": said}
    recorded, new = ledger.record_feedback(report())
    assert not new and recorded.detail == edited.detail
    with pytest.raises(FeedbackRefused, match="you said 'correct'"):
        ledger.record_feedback(row(verdict="correct", detail=edited.detail))


def test_what_is_accepted_says_what_is_right(ledger: Ledger) -> None:
    for number, detail in enumerate(({"comment": "no"}, {"label": " "}, {"label": "bus"})):
        ledger.record_feedback(row(number << 224, detail=detail, state="waiting", image=b"image"))
    for number, edit in ((0, {}), (1, {"text": " "}), (2, {"label": ""})):
        with pytest.raises(LedgerError, match="says neither a label nor a text") as refused:
            ledger.review_correction(f"{number:08x}", True, actor="ann", reason="seen", **edit)
        assert "--label" in refused.value.fix and len(ledger.corrections("waiting")) == 3
    ledger.review_correction("0" * 8, True, actor="ann", reason="seen", text="a bus")
    unchanged = ledger.review_correction(f"{2:08x}", True, actor="ann", reason="seen", label="bus", text="")
    assert unchanged.detail == {"label": "bus"} and ledger.audit_rows(1)[0].detail == {"reason": "seen"}
    assert [each.detail.get("text") for each in ledger.corrections("accepted")] == ["a bus", None]
    assert ledger.review_correction(f"{1:08x}", False, actor="ann", reason="nothing").image is None


@pytest.mark.parametrize(
    ("edit", "verdict"),
    [({"label": "cat"}, "right"), ({"text": "cat"}, "right"), ({"label": "dog"}, "correct"),
     ({"label": "dog", "text": "cat"}, "correct")],
)  # fmt: skip
def test_an_audited_answer_is_right_if_the_reviewer_says_the_same(
    ledger: Ledger, edit: dict[str, str], verdict: str
) -> None:
    ledger.record_feedback(row(caller="audit", verdict="audit", detail={"answered": "cat"}, state="waiting"))
    with pytest.raises(LedgerError, match="neither a label nor a text"):
        ledger.review_correction("0" * 8, True, actor="ann", reason="seen")
    assert ledger.corrections("waiting")[0].verdict == "audit"
    reviewed = ledger.review_correction("0" * 8, True, actor="ann", reason="seen", **edit)
    assert (reviewed.verdict, reviewed.detail["answered"]) == (verdict, "cat")


def test_of_two_reviews_at_once_one_counts(ledger: Ledger) -> None:
    ledger.record_feedback(row(detail={"label": "bus"}, state="waiting", image=b"image"))

    def review(accept: bool) -> bool:
        try:
            return bool(ledger.review_correction("0" * 8, accept, actor="ann", reason="seen"))
        except LedgerError:
            return False

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(review, [True, False] * 4)) == 1
    assert len(ledger.audit_rows(actor="ann")) == 1


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
    with closing(Ledger.open(load_settings(None, {"home": tmp_path}, environ={}).ledger)) as ledger:
        ledger.record_feedback(row(4, state="waiting", image=pictures(1)[0]))
    edit = ("--label", "автобус", "--text", "a red bus")
    done = ratchet(tmp_path, "feedback", "accept", f"{4:064x}", *edit, "--reason", "looked at it")
    assert "00000000 of app is accepted" in done.output
    listed = json.loads(ratchet(tmp_path, "feedback", "list", "--json").output)
    assert {"label": "автобус", "text": "a red bus", "said": {}} in [each["detail"] for each in listed]
    with pytest.raises(ConfigError, match="--verdict: there is no 'bad'"):
        ratchet(tmp_path, "feedback", "list", "--verdict", "bad")
