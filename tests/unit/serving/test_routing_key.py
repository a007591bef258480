"""Who asks, and what counts against the release that answers."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import Request

from core.access import OPERATOR, Principal
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from serving.http.app_state import routing_key
from serving.http.errors import ApiError, is_fault
from serving.releases.types import ReleaseSnapshot
from tests.unit.serving.scripted_vlms import ScriptedVlms, about_image, app_state, client

CANARY = (
    ReleaseSnapshot(4, "clip-a", "i3", "t3", "vlm-c", share=0.3),
    ReleaseSnapshot(3, "clip-a", "i3", "t3", "vlm-b"),
)


def request(caller: Principal | None = None, **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw, "state": {} if caller is None else {"principal": caller}})


def test_a_caller_is_its_api_key_else_what_it_says_of_itself_else_the_request() -> None:
    told = {"authorization": "Bearer secret", "x_ratchet_key": "mine", "x_request_id": "r1"}
    assert routing_key(request(Principal("bot", frozenset(), key_id="0123abcd"), **told), "ann") == "0123abcd"
    assert routing_key(request(OPERATOR, **told), "ann") == "mine"
    del told["x_ratchet_key"]
    assert routing_key(request(OPERATOR, **told), "ann") == "ann"
    assert routing_key(request(Principal("anonymous", frozenset(), "anonymous"), **told)) == "r1"
    assert routing_key(request()) != routing_key(request())


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (AdapterUnservable("gone"), True), (ApiError(500, "not finite"), True), (ZeroDivisionError(), True),
        (Unavailable("no replica"), False), (DeadlineExceeded("late"), False), (QueueFull("full"), False),
        (InvalidRequest("too long"), False), (ApiError(400, "wrong"), False),
    ],
)  # fmt: skip
def test_faults_of_the_release_count_and_those_of_clients_and_load_do_not(error: Exception, counts: bool) -> None:
    assert is_fault(error) is counts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "failed"),
    [(None, 0), (ApiError(500, "not finite"), 1), (QueueFull("full"), 0), (AdapterUnservable("gone"), 1)],
)
async def test_every_request_is_counted_for_the_release_that_answered(
    stream: bool, failure: Exception | None, failed: int
) -> None:
    at = app_state(ScriptedVlms(failure=failure, fails_at=1))
    async with client(at) as http:
        await http.post("/v1/chat/completions", json={"messages": about_image(), "stream": stream})
    counted = at.admission.answered()[3]
    assert (counted.requests, counted.failed) == (1, failed)


async def test_openais_user_is_answered_by_one_side_and_the_header_says_which() -> None:
    at = app_state(ScriptedVlms())
    at.admission.adopt(CANARY)
    seen: dict[str, set[str]] = {}
    async with client(at) as http:
        for number in range(60):
            body: dict[str, Any] = {"messages": about_image(), "user": f"user-{number % 20}"}
            answer = await http.post("/v1/chat/completions", json=body)
            told = (answer.headers["x-ratchet-release"], answer.json()["model"], answer.headers["x-ratchet-adapter"])
            assert told in {("4", "vlm@4", "vlm-c"), ("3", "vlm@3", "vlm-b")}
            seen.setdefault(body["user"], set()).add(told[0])
    assert {len(sides) for sides in seen.values()} == {1}
    assert set.union(*seen.values()) == {"3", "4"}
