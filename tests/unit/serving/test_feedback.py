"""Receipts of answers, and what callers say of them."""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from core.errors import LedgerUnavailable
from core.ledger import feedback as feedback_queries
from core.ledger.rows import utc_now
from ratchet_client import data_uri
from serving.http import answer_receipts
from serving.http.answer_receipts import MAX_CHARS, MOST_SHOWN, ROUTES, AnswerReceipts, Route
from serving.http.errors import ApiError
from serving.http.store_services import FeedbackService, ReceiptService
from streams.store.rows import Position
from streams.store.sample_store import SampleStore
from tests.support.inputs import pictures
from tests.support.samples import put, sample
from tests.unit.serving.auth_app import OPERATOR, AuthApp, refusal
from tests.unit.serving.scripted_vlms import app_of

ANSWERS = AnswerReceipts(SecretStr(OPERATOR))
PICTURE = pictures(1)[0]
IDS = [sample(0, offset)["id"] for offset in range(3)]


def refused(receipt: str, answers: AnswerReceipts = ANSWERS) -> str:
    with pytest.raises(ApiError) as raised:
        answers.read(receipt)
    assert raised.value.status_code == 400
    return str(raised.value.code)


@given(st.sampled_from(ROUTES), st.integers(0, 2**32 - 1), st.binary(max_size=99), st.lists(st.sampled_from(IDS)))
def test_a_receipt_says_what_was_answered_and_has_nothing_of_it(
    route: Route, release: int, body: bytes, shown: list[str]
) -> None:
    receipt = ANSWERS.issue(route, release, body, shown)
    read = ANSWERS.read(receipt)
    assert (read.route, read.release, read.shown) == (route, release, tuple(each[:12] for each in shown[:MOST_SHOWN]))
    assert abs(read.at - utc_now()) < timedelta(minutes=1)
    assert len(receipt) <= MAX_CHARS
    again, other = (
        ANSWERS.read(ANSWERS.issue(route, release, body)),
        ANSWERS.read(ANSWERS.issue(route, release, b"?" * 100)),
    )
    assert (again.input, other.input == read.input) == (read.input, False)
    raw = urlsafe_b64decode(receipt.removeprefix("a1."))
    assert len(body) < 8 or body not in raw


@given(st.one_of(st.text(max_size=80), st.text(max_size=80).map("a1.".__add__), st.binary(max_size=80).map(
    lambda raw: "a1." + urlsafe_b64encode(raw).decode()
)))  # fmt: skip
def test_what_is_no_receipt_is_refused(text: str) -> None:
    assert refused(text) in ("invalid_answer", "unknown_answer")


def test_each_changed_byte_another_installation_and_another_time_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = ANSWERS.issue("search", 7, b"body", IDS)
    raw = urlsafe_b64decode(receipt.removeprefix("a1."))
    for index in range(len(raw)):
        changed = raw[:index] + bytes([raw[index] ^ 1]) + raw[index + 1 :]
        code = refused("a1." + urlsafe_b64encode(changed).decode())
        assert code == ("unknown_answer" if index < 4 else "invalid_answer")
    for end in range(len(raw)):
        assert refused("a1." + urlsafe_b64encode(raw[:end]).decode()) == "invalid_answer"
    assert refused(receipt, AnswerReceipts(SecretStr("another"))) == "unknown_answer"
    for days, code in ((31, "answer_expired"), (-1, "answer_expired")):
        now = answer_receipts.time.time() + days * 86400
        with monkeypatch.context() as at:
            at.setattr(answer_receipts.time, "time", lambda now=now: now)
            assert refused(receipt) == code


@pytest.fixture
def server(closed: AuthApp) -> AuthApp:
    put(SampleStore(closed.settings.lake), [sample(0, 0), sample(0, 1)], Position("samples", 0, 2))
    services = {"receipts": ReceiptService(closed.settings), "feedback": FeedbackService(closed.ledger)}
    closed.app = app_of(replace(closed.app_state(), answers=ANSWERS, **services))
    return closed


async def say(server: AuthApp, answer: str, key: str = OPERATOR, **said: Any) -> httpx.Response:
    return await server.send("POST", "/v1/feedback", key, json={"answer": answer, **said})


async def test_what_is_said_is_recorded_once_for_each_answer_and_caller_and_told(server: AuthApp) -> None:
    _, key = server.ledger.create_key("app", ["feedback"], actor="test")
    answer = ANSWERS.issue("classify", 3, b"{}")
    said = {"verdict": "correct", "label": "bus", "comment": "not a car"}
    first = await say(server, answer, key, **said)
    assert first.status_code == 201, first.text
    assert first.json().items() >= {"release": 3, "route": "classify", "verdict": "correct", "repeated": False}.items()
    again = await asyncio.gather(*(say(server, answer, key, **said) for _ in range(5)))
    assert [each.status_code for each in again] == [200] * 5
    assert all(each.json() == {**first.json(), "repeated": True} for each in again)
    assert "wrong" not in refusal(await say(server, answer, key, verdict="right"), 409, "feedback_exists")
    assert (await say(server, answer, verdict="wrong")).status_code == 201, "another caller"

    rows = server.ledger.feedback()
    assert {(row.caller, row.verdict) for row in rows} == {("app", "correct"), ("operator", "wrong")}
    assert [row.caller for row in server.ledger.feedback(verdict="wrong", release=3)] == ["operator"]
    assert server.ledger.feedback_counts() == [
        {"release": 3, "route": "classify", "verdict": verdict, "count": 1, "callers": 1}
        for verdict in ("correct", "wrong")
    ]
    told = [row.data for row in server.ledger.waiting_events() if row.type == "ratchet.feedback.v1"]
    assert [each["caller"] for each in told] == ["app", "operator"]
    assert told[0].items() >= {"label": "bus", "release": 3, "input": rows[0].input}.items()
    assert server.ledger.prune_feedback(utc_now() - timedelta(days=1)) == 0
    assert server.ledger.prune_feedback(utc_now()) == 2


async def test_a_chosen_sample_is_one_that_the_answer_showed_and_that_is_still_there(server: AuthApp) -> None:
    answer = ANSWERS.issue("search", 3, b"{}", IDS)
    chosen = await say(server, answer, verdict="chosen", object_id=IDS[1])
    assert chosen.status_code == 201
    assert server.ledger.feedback()[0].detail == {"object_id": IDS[1], "position": 1}
    for said, status, code in (
        ({"object_id": IDS[2]}, 410, "sample_deleted"),
        ({"object_id": "f" * 64}, 400, "invalid_value"),
        ({"object_id": IDS[0], "position": 1}, 400, "invalid_value"),
        ({"position": 3}, 400, "invalid_value"),
        ({}, 400, "missing_value"),
        ({"position": -1}, 400, "invalid_value"),
        ({"object_id": "f" * 63}, 400, "invalid_value"),
    ):
        refusal(await say(server, answer, verdict="chosen", **said), status, code)
    refusal(await say(server, answer, verdict="correct"), 400, "missing_value")
    refusal(await say(server, "a1.", verdict="right"), 400, "invalid_answer")
    assert len(server.ledger.feedback()) == 1


async def test_a_correction_with_an_image_waits_for_a_review_and_others_have_none(server: AuthApp) -> None:
    answer, image = ANSWERS.issue("search", 3, b"{}"), data_uri(PICTURE)
    said = {"verdict": "correct", "label": "bus", "image": image}
    first = await say(server, answer, **said)
    assert (first.status_code, first.json()["state"]) == (201, "waiting")
    assert (await say(server, answer, **said)).json()["repeated"]
    for other_image in ({"image": data_uri(pictures(2)[1])}, {"image": None}):
        refusal(await say(server, answer, **{**said, **other_image}), 409, "feedback_exists")
    (row,) = server.ledger.corrections("waiting", images=True)
    assert row.image == PICTURE and "image" not in row.detail
    assert all(image not in str(each.data) for each in server.ledger.waiting_events())
    routes: list[tuple[Route, dict[str, str], str]] = [
        ("search", {"verdict": "wrong"}, "invalid_value"),
        ("vqa", {}, "invalid_value"),
        ("search", {"image": "data:image/png;base64,AAAA"}, "image_format"),
        ("search", {"image": "https://elsewhere.example/a.png"}, "image_format"),
        ("search", {"image": "data:image/png;base64," + "A" * (3 << 19)}, "image_too_large"),
    ]
    for answered, other, code in routes:
        refused = await say(server, ANSWERS.issue(answered, 3, b""), **{**said, **other})
        assert (refused.json()["error"]["param"], refused.json()["error"]["code"]) == ("image", code)
    assert len(server.ledger.corrections("waiting")) == 1


async def test_a_caller_without_the_scope_one_that_says_too_much_and_a_ledger_that_is_away(
    server: AuthApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = server.ledger.create_key("reader", ["infer", "search"], actor="test")
    _, talker = server.ledger.create_key("talker", ["feedback"], actor="test")
    refusal(await say(server, ANSWERS.issue("vqa", 1, b""), key, verdict="right"), 403, "insufficient_scope")
    monkeypatch.setattr(feedback_queries, "PER_DAY", 2)
    answers = [ANSWERS.issue("vqa", 1, bytes([number])) for number in range(3)]
    assert [(await say(server, each, talker, verdict="right")).status_code for each in answers] == [201, 201, 429]
    assert (await say(server, answers[0], talker, verdict="right")).status_code == 200, "a repeated one costs nothing"

    def away(_: object) -> None:
        raise LedgerUnavailable("the ledger cannot be used now: test.", "Wait.")

    monkeypatch.setattr(server.ledger, "record_feedback", away)
    refusal(await say(server, answers[2], verdict="right"), 503, "ledger_unavailable")
