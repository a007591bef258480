"""What callers say of answers over HTTP, in calls and in events of User Behavior Insights."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from core.errors import LedgerError, LedgerUnavailable
from core.ledger import feedback as feedback_queries
from core.ledger.rows import utc_now
from ratchet_client import data_uri
from serving.http import answer_receipts
from serving.http.answer_receipts import MAX_CHARS, AnswerReceipts, Route
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


@pytest.fixture
def server(closed: AuthApp) -> AuthApp:
    closed.ledger.prune_feedback(utc_now())
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


async def test_a_wrong_answer_with_its_image_waits_for_a_person_who_says_what_is_right(server: AuthApp) -> None:
    said = {"verdict": "wrong", "image": data_uri(PICTURE)}
    routes: tuple[Route, ...] = ("embeddings", "classify", "search")
    states = [(await say(server, ANSWERS.issue(route, 3, b"{}"), **said)).json()["state"] for route in routes]
    assert states == ["waiting"] * 3
    rows = server.ledger.corrections("waiting", images=True)
    assert {(row.verdict, row.image) for row in rows} == {("wrong", PICTURE)}
    assert all(row.detail.keys() == {"image_digest"} for row in rows)


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
        ("search", {"verdict": "right"}, "invalid_value"),
        ("vqa", {}, "invalid_value"),
        ("search", {"image": "data:image/png;base64,AAAA"}, "image_format"),
        ("search", {"image": "https://elsewhere.example/a.png"}, "image_format"),
        ("search", {"image": "data:image/png;base64," + "A" * (3 << 19)}, "image_too_large"),
    ]
    for answered, other, code in routes:
        refused = await say(server, ANSWERS.issue(answered, 3, b""), **{**said, **other})
        assert (refused.json()["error"]["param"], refused.json()["error"]["code"]) == ("image", code)
    assert len(server.ledger.corrections("waiting")) == 1


async def test_no_caller_gives_the_verdict_of_an_audit_or_has_its_name(server: AuthApp) -> None:
    refusal(await say(server, ANSWERS.issue("classify", 3, b"{}"), verdict="audit"), 400, "invalid_value")
    with pytest.raises(LedgerError, match="audit"):
        server.ledger.create_key("audit", ["feedback"], actor="test")
    assert server.ledger.feedback() == []


async def test_a_forged_an_expired_and_a_receipt_of_elsewhere_are_refused_and_a_replayed_one_counts_once(
    server: AuthApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ANSWERS.issue("classify", 3, b"{}")
    forged = [answer[:40] + ("A" if answer[40] != "A" else "B") + answer[41:], answer[:-4], answer + "AAAA", "a1.", "",
              answer + " " * MAX_CHARS]  # fmt: skip
    for receipt in forged:
        refusal(await say(server, receipt, verdict="wrong"), 400, "invalid_answer")
    elsewhere = AnswerReceipts(SecretStr("another")).issue("classify", 3, b"{}")
    refusal(await say(server, elsewhere, verdict="wrong"), 400, "unknown_answer")
    with monkeypatch.context() as later:
        later.setattr(answer_receipts, "DAYS", -1.0)
        refusal(await say(server, answer, verdict="wrong"), 400, "answer_expired")
    assert [(await say(server, answer, verdict="wrong")).status_code for _ in range(3)] == [201, 200, 200]
    assert len(server.ledger.feedback()) == 1


def event(action: str, answer: str | None, ordinal: int | None = None, **fields: Any) -> dict[str, Any]:
    """As the collector of OpenSearch sends it."""
    object_id = fields.pop("object_id", None)
    return {
        "application": "shop", "action_name": action, "query_id": answer, "session_id": "s", "client_id": "c",
        "user_id": "", "timestamp": "2026-01-02T03:04:05.678Z", "message_type": "INFO", "message": "",
        "event_attributes": {
            "object": {"object_id": object_id, "object_id_field": "id", "description": None},
            "position": {} if ordinal is None else {"ordinal": ordinal, "xy": {"x": 1.5, "y": 2}},
        }, **fields,
    }  # fmt: skip


async def ubi(server: AuthApp, body: Any, key: str = OPERATOR) -> dict[str, Any]:
    answer = await server.send("POST", "/v1/feedback/ubi", key, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def counts(recorded: int = 0, repeated: int = 0, ignored: int = 0, refused: Any = ()) -> dict[str, Any]:
    return {
        "object": "feedback.ubi", "recorded": recorded, "repeated": repeated, "ignored": ignored,
        "refused": list(refused),
    }  # fmt: skip


async def test_a_result_that_was_taken_is_a_chosen_sample_counted_from_one_and_once(server: AuthApp) -> None:
    by_place, by_id = (ANSWERS.issue("search", 3, body, IDS) for body in (b"1", b"2"))
    clicks = [event("click", by_place, 1), event("purchase", by_id, 7, object_id=IDS[1])]
    assert await ubi(server, clicks[0]) == counts(recorded=1)
    assert await ubi(server, clicks) == counts(recorded=1, repeated=1)
    rows = {row.input: (row.verdict, row.detail) for row in server.ledger.feedback()}
    assert rows == {
        ANSWERS.read(by_place).input: ("chosen", {"position": 0}),
        ANSWERS.read(by_id).input: ("chosen", {"object_id": IDS[1], "position": 1}),
    }
    assert (await say(server, by_place, verdict="chosen", position=0)).json()["repeated"]


async def test_thumbs_are_verdicts_and_other_actions_are_ignored(server: AuthApp) -> None:
    up, down = (ANSWERS.issue("vqa", 3, body) for body in (b"1", b"2"))
    others = [event(action, None) for action in ("impression", "on_search", "page_exit")]
    events = [event("thumbs_up", up, 4), *others, event("thumbs_down", down, object_id="message 7")]
    assert await ubi(server, events) == counts(recorded=2, ignored=3)
    assert {(row.verdict, row.release, *row.detail) for row in server.ledger.feedback()} == {("right", 3), ("wrong", 3)}


async def test_a_refused_event_is_named_and_the_others_count(server: AuthApp) -> None:
    answer, vqa = ANSWERS.issue("search", 3, b"{}", IDS), ANSWERS.issue("vqa", 3, b"")
    wrong: list[tuple[Any, str]] = [
        (event("click", None, 1), "missing_value"),
        (event("click", "00112233-4455-6677-8899-aabbccddeeff", 1), "invalid_answer"),
        (event("click", answer, 0), "invalid_value"),
        (event("click", answer, 4), "invalid_value"),
        (event("click", answer), "missing_value"),
        (event("click", answer, object_id="ISBN 0-061-96436-0"), "invalid_value"),
        (event("click", answer, object_id=IDS[2]), "sample_deleted"),
        (event("click", vqa, 1), "invalid_value"),
        (event("click", answer, 1, timestamp="yesterday"), "invalid_value"),
        (event("click", answer, 1, event_attributes=[]), "invalid_value"),
        ({"action_name": "click"}, "invalid_value"),
        ("click", "invalid_value"),
        (event("click", answer, 3), "feedback_exists"),
    ]
    said = await ubi(server, [event("click", answer, 2), *(each for each, _ in wrong)])
    assert (said["recorded"], said["repeated"], said["ignored"]) == (1, 0, 0)
    assert [(each["index"], each["code"]) for each in said["refused"]] == [
        (index, code) for index, (_, code) in enumerate(wrong, 1)
    ]
    assert all(each["message"] for each in said["refused"])
    for body, code in (([event("view", None)] * 101, "invalid_value"), ("click", "invalid_value")):
        refusal(await server.send("POST", "/v1/feedback/ubi", OPERATOR, json=body), 400, code)


async def test_events_need_the_scope_and_have_the_limits_of_feedback(
    server: AuthApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, reader = server.ledger.create_key("events-reader", ["infer", "search"], actor="test")
    _, shop = server.ledger.create_key("shop", ["feedback"], actor="test")
    refusal(await server.send("POST", "/v1/feedback/ubi", reader, json=[]), 403, "insufficient_scope")
    monkeypatch.setattr(feedback_queries, "PER_DAY", 2)
    said = await ubi(server, [event("like", ANSWERS.issue("vqa", 1, bytes([number]))) for number in range(3)], shop)
    assert (said["recorded"], [each["code"] for each in said["refused"]]) == (2, ["rate_limited"])


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

    def away(*_: object) -> None:
        raise LedgerUnavailable("the ledger cannot be used now: test.", "Wait.")

    monkeypatch.setattr(server.ledger, "record_feedback", away)
    refusal(await say(server, answers[2], verdict="right"), 503, "ledger_unavailable")
