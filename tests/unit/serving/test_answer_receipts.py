"""Receipts of answers: no one but this installation makes one, and no content is in it."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from core.ledger.rows import utc_now
from serving.http import answer_receipts
from serving.http.answer_receipts import MAX_CHARS, MOST_SHOWN, PREFIX, ROUTES, AnswerReceipts, Route
from serving.http.errors import ApiError

ANSWERS, ELSEWHERE = AnswerReceipts(SecretStr("this one")), AnswerReceipts(SecretStr("another"))
IDS = [f"{number:064x}" for number in range(1 << 60, (1 << 60) + 3)]
CODES = ("invalid_answer", "unknown_answer", "answer_expired")


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


def encoded(raw: bytes) -> str:
    return PREFIX + urlsafe_b64encode(raw).decode()


RECEIPTS = [
    answers.issue(route, release, bytes([release]), IDS[:count])
    for answers in (ANSWERS, ELSEWHERE)
    for route in ROUTES
    for release, count in ((1, 0), (2, 3))
]
RAW = [urlsafe_b64decode(receipt.removeprefix(PREFIX)) for receipt in RECEIPTS]
PLACE = st.integers(0, len(RECEIPTS[-1]))


def flipped(raw: bytes, place: int, bits: int) -> bytes:
    place %= len(raw)
    return raw[:place] + bytes([raw[place] ^ bits]) + raw[place + 1 :]


RECEIPT, BYTES = st.sampled_from(RECEIPTS), st.sampled_from(RAW)
MUTATED = st.one_of(
    st.builds(flipped, BYTES, PLACE, st.integers(1, 255)).map(encoded),
    st.builds(lambda raw, end: raw[: min(end, len(raw) - 1)], BYTES, PLACE).map(encoded),
    st.builds(lambda raw, more: raw + more, BYTES, st.binary(min_size=1, max_size=30)).map(encoded),
    st.builds(lambda one, other, at, to: one[:at] + other[to:], BYTES, BYTES, PLACE, PLACE).map(encoded),
    st.builds(lambda receipt, at, put: receipt[:at] + put + receipt[at:], RECEIPT, PLACE, st.text(max_size=4)),
    st.builds(lambda receipt, at, put: receipt[:at] + put + receipt[at + 1 :], RECEIPT, PLACE, st.characters()),
    st.builds(lambda receipt, end: receipt[:end], RECEIPT, PLACE),
    RECEIPT.map(lambda receipt: receipt.translate({ord("-"): "+", ord("_"): "/"})),
    RECEIPT.map(str.swapcase),
    st.binary(max_size=MAX_CHARS).map(encoded),
    st.text(max_size=MAX_CHARS * 2),
)


@settings(max_examples=4000, deadline=None)
@given(MUTATED)
def test_no_changed_truncated_extended_spliced_or_random_receipt_is_accepted(receipt: str) -> None:
    if receipt not in RECEIPTS[: len(ROUTES) * 2]:
        assert refused(receipt) in CODES


def test_a_receipt_with_other_characters_that_decode_to_the_same_is_refused() -> None:
    receipt = ANSWERS.issue("search", 1, b"", IDS)
    for same in (receipt + "=", receipt + "====", receipt + "\n", receipt[:9] + "!" + receipt[9:], receipt + " "):
        assert refused(same) == "invalid_answer"
