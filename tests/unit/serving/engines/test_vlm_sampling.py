from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from core.errors import AdapterError
from serving.engines.vlm.generation import SMALLEST, GenerationRequest, Message
from serving.engines.vlm.hf_engine import BatchRow, _Choice
from serving.errors import InvalidRequest
from serving.http.chat import ChatRequest

MESSAGES = (Message("user", ("hi",)),)
VOCABULARY = 64
FUZZED = 10_000
NAMES = ("temperature", "top_p", "max_tokens", "seed")
EDGES = [
    0.0, -0.0, 1e-320, 5e-324, -1e-320, SMALLEST, SMALLEST / 2, 1e-45, 1e-30, 1e-8, 1e-5, 0.009, 0.01, 0.5, 1.0,
    1.0000001, 2.0, 2.0001, 1e30, 1.7e308, math.inf, -math.inf, math.nan, -1.0,
]  # fmt: skip
LOGITS = torch.stack(
    [
        torch.zeros(VOCABULARY),
        torch.linspace(-1e30, 3e38, VOCABULARY),
        torch.linspace(0, 30, VOCABULARY),
        torch.full((VOCABULARY,), -torch.inf).index_fill(0, torch.tensor([5]), 0.0),
        torch.full((VOCABULARY,), -3e38).index_fill(0, torch.tensor([7, 9]), -1e38),
    ]
)


def fuzzed(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Parameter sets: edges, plain values and any float64."""
    chance = random.Random(seed)
    for _ in range(count):
        numbers = [
            chance.choice([chance.choice(EDGES), chance.uniform(0, 2), 10 ** chance.uniform(-330, 3)]) for _ in range(2)
        ]
        yield {
            "temperature": numbers[0], "top_p": numbers[1] if chance.random() < 0.5 else chance.uniform(1e-6, 1),
            "max_tokens": chance.choice([1, 7, 2**31, 10**30, 0, -1]) if chance.random() < 0.2 else 3,
            "seed": chance.choice([None, 0, 1, 2**63 - 1, 2**63, -1, -(2**63), 10**40]),
        }  # fmt: skip


def row_of(request: GenerationRequest, told: list[Any]) -> BatchRow:
    return BatchRow(request, 3, told.append)


def test_of_ten_thousand_parameter_sets_each_is_refused_by_its_field_or_samples_a_token() -> None:
    taken = 0
    for number, parameters in enumerate(fuzzed(FUZZED, 1)):
        try:
            request = GenerationRequest(MESSAGES, **parameters)
        except InvalidRequest as error:
            assert error.message.split(":")[0] in NAMES
            continue
        taken += 1
        told: list[Any] = []
        row = row_of(request, told)
        logits = LOGITS[number % len(LOGITS)]
        _Choice([row], frozenset())(torch.zeros(1, 1, dtype=torch.long), logits[None])
        ((token, logprob, _),) = told
        assert 0 <= token < VOCABULARY and math.isfinite(logprob), parameters
    assert FUZZED // 10 < taken < FUZZED * 9 // 10


def test_of_ten_thousand_bodies_what_the_api_takes_the_engines_take_and_the_rest_is_refused_by_its_field() -> None:
    taken = 0
    for parameters in fuzzed(FUZZED, 2):
        text = json.dumps({"messages": [{"role": "user", "content": "hi"}], **parameters})
        try:
            body = ChatRequest.model_validate_json(text)
        except ValidationError as error:
            assert error.errors()[0]["loc"][0] in NAMES
            continue
        taken += 1
        plain = {"temperature": body.temperature, "top_p": body.top_p}
        GenerationRequest(MESSAGES, **{name: value for name, value in plain.items() if value is not None})
    assert FUZZED // 10 < taken < FUZZED * 9 // 10


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", value) for value in (math.nan, math.inf, -0.1, 2.1, 1e-320, 5e-324, 1e-45)]
    + [("top_p", value) for value in (math.nan, math.inf, 0.0, -0.5, 1.01, 1e-320, 1e-45)]
    + [("max_tokens", 0), ("max_tokens", 2**31), ("seed", -1), ("seed", 2**63)],
)
def test_what_is_out_of_range_is_refused_by_its_name(field: str, value: float) -> None:
    with pytest.raises(InvalidRequest, match=f"^{field}: "):
        GenerationRequest(MESSAGES, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(("asked", "temperature", "top_p"), [
    (0.0, 0.0, 1.0), (-0.0, 0.0, 1.0), (1e-30, 0.01, 0.5), (0.009, 0.01, 0.5), (0.01, 0.01, 0.5), (2.0, 2.0, 0.5),
])  # fmt: skip
def test_a_low_temperature_is_raised_and_without_one_the_choice_is_greedy(
    asked: float, temperature: float, top_p: float
) -> None:
    request = GenerationRequest(MESSAGES, temperature=asked, top_p=0.5)
    assert (request.temperature, request.top_p) == (temperature, top_p)


def test_vllm_clamps_alike() -> None:
    pytest.importorskip("vllm")
    from serving.engines.vlm.vllm_engine import sampling

    for parameters in fuzzed(300, 3):
        try:
            request = GenerationRequest(MESSAGES, **parameters)
        except InvalidRequest:
            continue
        theirs = sampling(request, every=True)
        assert (theirs.temperature, theirs.top_p) == (request.temperature, request.top_p)
        assert (theirs.max_tokens, theirs.seed) == (request.max_tokens, request.seed)


def test_the_smallest_share_leaves_the_likeliest_token() -> None:
    told: list[Any] = []
    request = GenerationRequest(MESSAGES, temperature=2.0, top_p=SMALLEST)
    choice = _Choice([row_of(request, told) for _ in range(20)], frozenset())
    choice(torch.zeros(20, 1, dtype=torch.long), torch.linspace(0, 1, VOCABULARY).expand(20, -1))
    assert [token for token, _, _ in told] == [VOCABULARY - 1] * 20


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_not_finite_fails_alone(bad: float, temperature: float) -> None:
    lists: list[list[Any]] = [[], [], []]
    rows = [row_of(GenerationRequest(MESSAGES, temperature=temperature), told) for told in lists]
    scores = torch.zeros(3, VOCABULARY)
    scores[1, 4] = bad
    choice = _Choice(rows, frozenset())
    for _ in range(2):
        choice(torch.zeros(3, 1, dtype=torch.long), scores)
    assert [len(told) for told in lists] == [2, 1, 2]
    assert isinstance(lists[1][0], AdapterError)
    assert [row.done for row in rows] == [False, True, False]
