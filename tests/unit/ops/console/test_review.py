"""The page on which corrections are reviewed: what it shows, to whom, and what a decision writes."""

from __future__ import annotations

import html
import io
from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from core.errors import LedgerUnavailable
from core.ledger import Ledger
from core.ledger.rows import FeedbackRow, utc_now
from ops.console.pages import feedback
from tests.support.inputs import pictures
from tests.support.story import EVIL
from tests.unit.ops.console.conftest import signed_in, text

PART = {"hx-request": "true", "hx-target": "review"}
YESTERDAY = utc_now() - timedelta(days=1)


def wait(ledger: Ledger, number: int, **fields: Any) -> str:
    """Record a correction that waits; the higher its number, the newer it is."""
    own = {"caller": "app", "verdict": "correct", "detail": {"label": f"label {number}"}, "image": pictures(1)[0]}
    made = FeedbackRow(
        id=f"{number:064x}", input="0" * 32, release=3, route="classify", answered_at=utc_now(), state="waiting",
        created_at=YESTERDAY + timedelta(seconds=number), **own | fields,
    )  # fmt: skip
    ledger.record_feedback(made)
    return made.id


def decide(operator: TestClient, feedback_id: str, decision: str, status: int = 200, **form: str) -> str:
    answer = operator.post(f"/feedback/{feedback_id}", data={"decision": decision, **form}, headers=PART)
    assert answer.status_code == status, answer.text
    return html.unescape(answer.text)


def card(page: str) -> str:
    """The ID of the correction that a page shows large."""
    return page.split("/picture?large=true")[0].rpartition("/feedback/")[2]


def size_of(answer: Any) -> tuple[int, int]:
    assert answer.headers["content-type"] == "image/png", answer.text
    return Image.open(io.BytesIO(answer.content)).size


def test_the_oldest_is_shown_large_with_what_was_said_and_the_others_small(
    operator: TestClient, ledger: Ledger
) -> None:
    newer, older = wait(ledger, 2, detail={"label": "bus"}), wait(ledger, 1, detail={"text": "a car", "comment": EVIL})
    page = operator.get("/feedback").text
    assert card(page) == older and EVIL not in page and html.escape(EVIL, quote=False)[:14] in page
    assert "Corrected by a caller" in page and "1 of 2" in page and ">\na car</textarea>" in page
    assert page.count('<li><a href="/feedback/') == 2 and f'href="/feedback/{newer}"' in page
    assert 'value="bus"' in operator.get(f"/feedback/{newer}", headers=PART).text
    assert operator.get("/feedback/" + "f" * 64).status_code == 404


def test_a_long_queue_shows_the_thumbnails_around_the_card(operator: TestClient, ledger: Ledger) -> None:
    most = feedback.THUMBNAILS
    ids = [wait(ledger, number, caller=f"app {number % 3}") for number in range(most + 30)]
    for at, first in ((0, 0), (most, most // 2), (most + 29, 30)):
        page = operator.get(f"/feedback/{ids[at]}", headers=PART).text
        shown = [each for each in ids if f'href="/feedback/{each}"' in page]
        assert (shown[0], len(shown), card(page)) == (ids[first], most, ids[at])
        assert f"{at + 1} of {most + 30}" in page and page.count('aria-current="true"') == 1


def test_after_a_decision_comes_the_next_card_and_after_the_last_one_those_left_out(
    operator: TestClient, ledger: Ledger
) -> None:
    first, second, third = (wait(ledger, number) for number in range(3))
    page = decide(operator, second, "accept", label="label 1")
    assert card(page) == third and "Accepted as “label 1”" in page
    page = decide(operator, third, "dismiss", label="ignored", reason="not a car")
    assert card(page) == first and "Dismissed" in page
    assert ledger.corrections("dismissed")[0].outcome == "not a car"
    page = decide(operator, first, "accept", label="bus", text="a bus")
    assert "Nothing waits for a review" in page and "/v1/feedback" in page
    assert [each.detail for each in ledger.corrections("accepted")] == [
        {"label": "bus", "text": "a bus", "said": {"label": "label 0"}}, {"label": "label 1"},
    ]  # fmt: skip
    noted = [(each.actor, each.action, each.detail["reason"]) for each in ledger.audit_rows() if "corr" in each.action]
    assert noted == [
        ("operator", "accept correction", feedback.REASON),
        ("operator", "dismiss correction", "not a car"),
        ("operator", "accept correction", feedback.REASON),
    ]


def test_what_says_nothing_is_not_accepted_and_what_was_typed_stays(operator: TestClient, ledger: Ledger) -> None:
    wrong = wait(ledger, 1, verdict="wrong", detail={"comment": "no"})
    wait(ledger, 2)
    page = decide(operator, wrong, "accept", 422, label=" ", reason="seen <b>")
    assert card(page) == wrong and "says neither a label nor a text" in page and "autofocus" in page
    assert 'value="seen <b>"' in page and len(ledger.corrections("waiting")) == 2
    assert card(decide(operator, wrong, "accept", label="bus")) != wrong


@pytest.mark.parametrize("said", ["two  words", " edges ", "a\r\nb", "ряд\tслов"])
def test_white_space_that_a_browser_changes_is_no_edit(operator: TestClient, ledger: Ledger, said: str) -> None:
    made = wait(ledger, 1, detail={"label": said, "text": said})
    decide(operator, made, "accept", label=" ".join(said.split()), text=said.strip().replace("\r\n", "\n"))
    assert ledger.corrections("accepted")[0].detail == {"label": said, "text": said}


def test_an_audited_answer_is_right_as_it_is_and_corrected_with_an_edit(operator: TestClient, ledger: Ledger) -> None:
    same, other = (wait(ledger, n, caller="audit", verdict="audit", detail={"answered": "red  cat"}) for n in (1, 2))
    page = operator.get("/feedback").text
    assert "Chosen at random" in page and "red  cat" in page and 'value="red cat"' in page
    none = wait(ledger, 3, caller="audit", verdict="audit", detail={"answered": None})
    decide(operator, same, "accept", label="red cat")
    page = decide(operator, other, "accept", label="dog")
    assert card(page) == none and "no label" in page
    decide(operator, none, "accept", label="None")
    assert [each.verdict for each in ledger.corrections("accepted")] == ["right", "correct", "correct"]


def test_what_another_person_decided_meanwhile_is_said_and_the_next_one_shown(
    operator: TestClient, ledger: Ledger
) -> None:
    first, second, third = (wait(ledger, number) for number in range(3))
    ledger.review_correction(second, False, actor="ben", reason="blurred")
    for page in (decide(operator, second, "accept", 409, label="x"), text(operator, f"/feedback/{second}")):
        assert card(page) == third and "ben" in page and "“blurred”" in page and "dismissed" in page
    assert [each.id for each in ledger.corrections("waiting")] == [first, third]


def test_a_ledger_that_is_away_is_said_and_nothing_is_lost(
    operator: TestClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = wait(ledger, 1)

    def away(*_: object, **__: object) -> None:
        raise LedgerUnavailable("the ledger cannot be used now.", "Bring it back.")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "review_correction", away)
        page = decide(operator, made, "accept", 422, label="typed")
        assert card(page) == made and "cannot be used now" in page and 'value="typed"' in page
    assert "Accepted" in decide(operator, made, "accept", label="typed")


def test_a_reader_sees_the_queue_and_decides_nothing(operator: TestClient, ledger: Ledger) -> None:
    made = wait(ledger, 1, detail={"label": "bus"})
    token = operator.headers.pop("x-csrf-token")
    for headers in (PART, {**PART, "x-csrf-token": "guessed"}):
        answer = operator.post(f"/feedback/{made}", data={"decision": "accept", "label": "x"}, headers=headers)
        assert answer.status_code == 403 and "too old" in answer.text
    operator.post("/sign-out", data={"csrf": token})
    anonymous = operator.get("/feedback").text
    assert card(anonymous) == made and "<textarea" not in anonymous and "/sign-in?next=/feedback" in anonymous
    _, key = ledger.create_key("reader", ["search"], actor="test")
    operator.headers["x-csrf-token"] = signed_in(operator, key)
    page = operator.get("/feedback").text
    assert card(page) == made and ">bus<" in page and "<textarea" not in page and "decision" not in page
    assert decide(operator, made, "accept", 403, label="x") and len(ledger.corrections("waiting")) == 1


def test_pictures_are_drawn_again_and_small_ones_in_whole_steps(operator: TestClient, ledger: Ledger) -> None:
    def saved(mode: str, size: tuple[int, int], kind: str, colour: Any) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, colour).save(buffer, kind)
        return buffer.getvalue()

    most = feedback.ENLARGED
    for number, (image, size) in enumerate((
        (saved("RGB", (1, 1), "PNG", "red"), (most, most)),
        (saved("RGB", (30, 20), "BMP", "red"), (most // 30 * 30, most // 30 * 20)),
        (saved("RGB", (7, 3000), "PNG", "red"), (1, most)),
        (saved("RGBA", (400, 300), "PNG", (0, 0, 0, 0)), (400, 300)),
        (saved("P", (16, 16), "GIF", 0), (most, most)),
    )):  # fmt: skip
        made = wait(ledger, number, image=image)
        assert size_of(operator.get(f"/feedback/{made}/picture?large=true")) == size
        assert max(size_of(operator.get(f"/feedback/{made}/picture"))) <= 96
    broken = wait(ledger, 9, image=b"GIF89a and no more")
    for path in (f"/feedback/{broken}/picture", "/feedback/" + "f" * 64 + "/picture"):
        assert operator.get(path).headers["content-type"] == "image/svg+xml"
