from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.engines.vlm.generation import Message
from serving.errors import QueueFull
from serving.http.errors import ApiError
from serving.http.vqa import normalised
from tests.unit.serving.scripted_vlms import ScriptedVlms, Visitor, app_of, app_state, client, png, uri

URL = "/v1/vqa"


async def ask(vlms: ScriptedVlms | None, **sent: Any) -> httpx.Response:
    async with client(app_state(vlms)) as http:
        return await http.post(URL, **sent)


async def test_a_free_answer_is_short_and_greedy() -> None:
    vlms = ScriptedVlms(words=(" a ", "bus "))
    answer = await ask(vlms, json={"image": uri(), "question": "what is this?"})
    assert answer.json() == {
        "object": "vqa", "answer": "a bus", "choices": [], "model": "vlm@3", "release": 3, "adapter": "vlm-b",
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
    }  # fmt: skip
    assert answer.headers["x-ratchet-release"] == "3"
    sent, _ = vlms.asked[0]
    assert sent.messages == (Message("user", (0, "what is this?")),)
    assert sent.temperature == 0
    assert sent.images[0].shape == (4, 6, 3)


async def test_choices_get_probabilities_that_sum_to_one() -> None:
    vlms = ScriptedVlms(logits=(-3.0, -1.0, -2.0))
    given = {"image": uri(), "question": "colour?", "choices": ["red", " green ", "blue"], "model": "vlm@2"}
    found = (await ask(vlms, json=given)).json()
    assert vlms.choices == ["red", "green", "blue"]
    assert found["answer"] == "green"
    assert [row["text"] for row in found["choices"]] == ["red", "green", "blue"]
    assert sum(row["probability"] for row in found["choices"]) == pytest.approx(1)
    ratio = found["choices"][1]["probability"] / found["choices"][0]["probability"]
    assert ratio == pytest.approx(math.exp(2))
    assert (found["release"], found["adapter"], found["usage"]) == (2, "base", None)


@pytest.mark.parametrize(
    "choices", [{"choices": ["yes", "no"]}, {"choices": '["yes", "no"]'}], ids=["repeated", "one JSON list"]
)
async def test_multipart_says_the_same(choices: dict[str, Any]) -> None:
    vlms = ScriptedVlms(logits=(-0.1, -2.0))
    files = {"image": ("shoe.png", png(), "image/png")}
    answer = await ask(vlms, files=files, data={"question": "is it a shoe?", **choices})
    assert answer.status_code == 200, answer.text
    assert answer.json()["answer"] == "yes"
    assert vlms.choices == ["yes", "no"]
    assert vlms.asked[0][0].images[0].shape == (4, 6, 3)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"choices": ["yes"]}, "choices"), ({"choices": ["yes", "yes "]}, "choices"),
        ({"choices": ["", "a"]}, "choices"),
        ({"choices": [str(n) for n in range(17)]}, "choices"), ({"question": ""}, "question"),
        ({"question": "x" * 2001}, "question"), ({"image": "https://x/a.png"}, "image"), ({"image": None}, "image"),
        ({"tools": []}, "tools"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(change: dict[str, Any], param: str) -> None:
    answer = await ask(ScriptedVlms(), json={"image": uri(), "question": "what?", **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


async def test_a_file_in_another_field_and_a_second_file_are_refused() -> None:
    wrong = await ask(ScriptedVlms(), files={"picture": png()}, data={"question": "what?"})
    two = await ask(ScriptedVlms(), files=[("image", png()), ("image", png())], data={"question": "what?"})
    assert (wrong.status_code, two.status_code) == (400, 400)
    assert wrong.json()["error"]["code"] == "unknown_field"


async def test_failures_are_errors_of_the_api() -> None:
    full = await ask(ScriptedVlms(failure=QueueFull("full.")), json={"image": uri(), "question": "what?"})
    none = await ask(None, json={"image": uri(), "question": "what?"})
    broken = await ask(
        ScriptedVlms(logits=(math.nan, 0.0)), json={"image": uri(), "question": "?", "choices": ["a", "b"]}
    )
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert (none.status_code, none.json()["error"]["code"]) == (404, "no_vlm")
    assert (broken.status_code, broken.json()["error"]["code"]) == (500, "not_finite")


@settings(deadline=None)
@given(st.lists(st.floats(max_value=0, min_value=-1e6), min_size=2, max_size=16))
def test_probabilities_sum_to_one_and_keep_the_order(scores: list[float]) -> None:
    shares = normalised(scores)
    assert math.fsum(shares) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in shares)
    assert all(shares[a] >= shares[b] for a in range(len(scores)) for b in range(len(scores)) if scores[a] > scores[b])


@pytest.mark.parametrize("scores", [[-math.inf, -math.inf], [0.0, math.nan], [math.inf, 0.0]])
def test_scores_without_a_meaning_are_an_error(scores: list[float]) -> None:
    with pytest.raises(ApiError):
        normalised(scores)


def test_an_impossible_choice_has_no_probability() -> None:
    assert normalised([-math.inf, -1.0]) == [0.0, 1.0]


async def test_a_client_that_hangs_up_is_not_computed_for() -> None:
    vlms = ScriptedVlms(hangs_at=0)
    at = app_state(vlms)
    visitor = Visitor(app_of(at), URL, json.dumps({"image": uri(), "question": "what?"}).encode())
    task = visitor.start()
    await vlms.waiting.wait()
    visitor.gone.set()
    await asyncio.wait_for(task, 5)
    assert vlms.closed == 1
    assert at.admission.in_flight() == {}
