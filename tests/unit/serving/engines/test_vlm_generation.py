from __future__ import annotations

import asyncio
import gc
import math
import queue
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from core.errors import AdapterError
from core.settings.serving import Serve
from serving.engines.vlm.generation import (
    SMALLEST,
    Detokenizer,
    GenerationRequest,
    Message,
    question,
)
from serving.engines.vlm.hf_engine import BatchRow, TransformersEngine, Worker, _Choice
from serving.engines.vlm.prompts import answer_tokens, end_token, inputs, render
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead, InvalidRequest
from tests.support.tiny_vlm import tiny_vlm_base
from tests.support.waiting import until

PICTURE = np.full((40, 24, 3), 90, np.uint8)
MESSAGES = (Message("user", ("hi",)),)
VOCABULARY = 64
NUMBERS = st.floats() | st.floats(0, 2) | st.sampled_from([-0.0, 5e-324, SMALLEST / 2, SMALLEST, 0.009, 0.01, 2.0001])
PARAMETERS = st.fixed_dictionaries(
    {"temperature": NUMBERS, "top_p": NUMBERS},
    optional={"max_tokens": st.sampled_from([1, 7, 2**31, 10**30, 0, -1]), "seed": st.integers(-1) | st.none()},
)
LOGITS = torch.stack(
    [
        torch.zeros(VOCABULARY),
        torch.linspace(-1e30, 3e38, VOCABULARY),
        torch.linspace(0, 30, VOCABULARY),
        torch.full((VOCABULARY,), -torch.inf).index_fill(0, torch.tensor([5]), 0.0),
        torch.full((VOCABULARY,), -3e38).index_fill(0, torch.tensor([7, 9]), -1e38),
    ]
)


def sample(requests: list[GenerationRequest], logits: torch.Tensor, passes: int = 1) -> list[list[Any]]:
    """What each row is told of its tokens; ``logits``: [rows, vocabulary]."""
    told: list[list[Any]] = [[] for _ in requests]
    rows = [BatchRow(request, 3, out.append) for request, out in zip(requests, told, strict=True)]
    choice = _Choice(rows, frozenset())
    for _ in range(passes):
        choice(torch.zeros(len(rows), 1, dtype=torch.long), logits)
    assert [row.done for row in rows] == [isinstance(out[-1], AdapterError) for out in told]
    return told


@settings(max_examples=1000, deadline=None)
@given(PARAMETERS, st.sampled_from(range(len(LOGITS))))
def test_any_parameters_are_refused_by_their_field_or_sample_a_token(parameters: dict[str, Any], row: int) -> None:
    try:
        request = GenerationRequest(MESSAGES, **parameters)
    except InvalidRequest as error:
        assert error.message.split(":")[0] in parameters
        return
    (((token, logprob, _),),) = sample([request], LOGITS[row][None])
    assert 0 <= token < VOCABULARY and math.isfinite(logprob)


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
def test_a_low_temperature_is_raised_and_zero_is_greedy(asked: float, temperature: float, top_p: float) -> None:
    request = GenerationRequest(MESSAGES, temperature=asked, top_p=0.5)
    assert (request.temperature, request.top_p) == (temperature, top_p)


def test_the_smallest_share_leaves_the_likeliest_token() -> None:
    request = GenerationRequest(MESSAGES, temperature=2.0, top_p=SMALLEST)
    told = sample([request] * 20, torch.linspace(0, 1, VOCABULARY).expand(20, -1))
    assert [token for ((token, _, _),) in told] == [VOCABULARY - 1] * 20


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_whose_logits_are_not_finite_fails_alone(bad: float, temperature: float) -> None:
    scores = torch.zeros(3, VOCABULARY)
    scores[1, 4] = bad
    told = sample([GenerationRequest(MESSAGES, temperature=temperature)] * 3, scores, passes=2)
    assert [len(each) for each in told] == [2, 1, 2]
    assert isinstance(told[1][0], AdapterError)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tiny_vlm_base(tmp_path_factory.mktemp("prompts")).processor()


def test_a_question_is_rendered_up_to_its_answer_which_ends_with_the_end_token(processor: Any) -> None:
    assert render(processor, question(PICTURE, "what is this?")) == (
        "<|im_start|>User:<image>what is this?<end_of_utterance>\nAssistant:"
    )
    tokens = answer_tokens(processor, "red")
    assert tokens[-1] == end_token(processor) == processor.tokenizer.convert_tokens_to_ids("<end_of_utterance>")
    assert processor.tokenizer.decode(tokens[:-1]) == "red"


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (3, 50), (50, 3), (3, 3), (1, 2048), (2048, 1)])
def test_a_picture_of_any_size_is_read_by_its_rows(processor: Any, size: tuple[int, int]) -> None:
    ramp = np.zeros((*size, 3), np.uint8)
    ramp[:, :, 0] = 250  # red: whatever its size, red is what the model gets, and nothing else
    pixels = inputs(processor, [question(ramp, "red?")])["pixel_values"][0, 0]
    red, green, blue = (float(channel.mean()) for channel in pixels)
    assert red > 0.9 and green == blue == -1


@pytest.mark.parametrize(
    ("messages", "images", "message"),
    [
        ((), 0, "no message"),
        ((Message("user", (0, 1, "same?")),), 1, "Use every image once"),
        ((Message("user", ("what?",)),), 1, "Use every image once"),
        ((Message("user", (1, 0, "same?")),), 2, "reading order"),
        ((Message("user", ("an <image> of what?",)),), 0, "stands for an image"),
    ],
)
def test_bad_messages_are_refused(processor: Any, messages: tuple[Message, ...], images: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render(processor, GenerationRequest(messages, (PICTURE,) * images))


def test_a_chat_template_that_refuses_is_an_error_of_the_request(processor: Any) -> None:
    strict = type(processor)(processor.image_processor, processor.tokenizer, image_seq_len=4)
    strict.chat_template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(InvalidRequest, match="turns must alternate"):
        render(strict, question(PICTURE, "what?"))


def _said(tokenizer: Any, tokens: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    words = Detokenizer(tokenizer, stop)
    return [words.take([token], i == len(tokens) - 1) for i, token in enumerate(tokens)], words


def test_chunks_add_up_to_what_the_tokenizer_decodes_and_a_character_is_said_when_it_is_whole(processor: Any) -> None:
    chance, tokenizer = random.Random(0), processor.tokenizer
    for _ in range(200):
        tokens = [chance.randrange(len(tokenizer)) for _ in range(chance.randrange(1, 20))]
        said, _ = _said(tokenizer, tokens)
        assert "".join(said) == tokenizer.decode(tokens, skip_special_tokens=True)
    tokens = tokenizer("né", add_special_tokens=False)["input_ids"]
    assert len(tokens) == 3  # the tiny tokenizer knows bytes only
    assert _said(tokenizer, tokens)[0] == ["n", "", "é"]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("blue",), "a red or "), ((" or", "red"), "a "), (("car",), "a red or blue"), (("blue!",), "a red or blue"),
        (("", "d o"), "a re"),
    ],
)  # fmt: skip
def test_nothing_after_a_stop_string_or_of_it_is_said(processor: Any, stop: tuple[str, ...], text: str) -> None:
    tokens = processor.tokenizer("a red or blue", add_special_tokens=False)["input_ids"]
    said, words = _said(processor.tokenizer, tokens, stop)
    assert "".join(said) == text
    assert words.stopped == (text != "a red or blue")


TOKENS = 6
PROMPTS = ["red?", "what is this?", "is there a red car?", "which colour?"]
POISON = "~"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> VlmBase:
    return tiny_vlm_base(tmp_path_factory.mktemp("worker"))


@pytest.fixture(scope="module")
def shared(base: VlmBase) -> Any:
    return base.build_model()


@pytest.fixture
def model(shared: Any) -> Iterator[Any]:
    """The model; hooks of a test are removed after it."""
    hooks: list[Any] = []
    shared.hook = lambda hook: hooks.append(shared.register_forward_pre_hook(hook, with_kwargs=True))
    yield shared
    for hook in hooks:
        hook.remove()


@pytest.fixture
def worker(base: VlmBase) -> Iterator[Worker]:
    processor = base.processor()
    worker = Worker(processor, frozenset({end_token(processor)}), batch=8, threads=1)
    yield worker
    worker.stop("The test is over.")
    worker.join()


def poisoned(processor: Any) -> Callable[..., None]:
    (token,) = processor.tokenizer(POISON, add_special_tokens=False)["input_ids"]

    def hook(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        if bool((given["input_ids"] == token).any()):
            raise RuntimeError("this prompt makes an index that is out of range")

    return hook


def request(text: str, temperature: float = 0.0) -> GenerationRequest:
    return GenerationRequest((Message("user", (text,)),), max_tokens=TOKENS, temperature=temperature, seed=7)


def answers(worker: Worker, model: Any, requests: list[GenerationRequest]) -> list[list[Any]]:
    """The complete output of each row; rows are queued before the worker can take the first one alone."""
    told: list[queue.Queue[Any]] = [queue.Queue() for _ in requests]
    with worker._changing:
        for one, out in zip(requests, told, strict=True):
            worker.put(model, BatchRow(one, TOKENS, out.put))
    results = []
    for out in told:
        items = [out.get(timeout=60)]
        while isinstance(items[-1], tuple) and not items[-1][2]:
            items.append(out.get(timeout=60))
        results.append(items)
    return results


def tokens(items: list[Any]) -> list[int]:
    return [token for token, _, _ in items]


async def test_what_fails_fails_alone_and_the_others_are_answered(worker: Worker, model: Any, base: VlmBase) -> None:
    alone = [tokens(answers(worker, model, [request(text)])[0]) for text in PROMPTS]
    model.hook(poisoned(base.processor()))
    asked = [*map(request, PROMPTS[:2]), request(f"red {POISON}?"), *map(request, PROMPTS[2:])]
    results = answers(worker, model, asked)
    (failure,) = results.pop(2)
    assert isinstance(failure, InvalidRequest) and "out of range" in failure.message
    assert [tokens(items) for items in results] == alone
    assert worker.last_error == ""
    before = worker.passed_at
    with pytest.raises(InvalidRequest, match="out of range"):
        await worker.score(model, request(f"red {POISON}?"), ["yes", "no"])
    assert len(await worker.score(model, request("red?"), ["yes", "no"])) == 2
    assert worker.passed_at > before


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_that_fails_on_its_way_goes_on_where_it_was(worker: Worker, model: Any, temperature: float) -> None:
    asked = [request(text, temperature) for text in PROMPTS]
    whole = answers(worker, model, asked)
    calls, passes = iter(range(100)), list[float]()

    def third_fails(*_: Any) -> None:
        passes.append(worker.passed_at)
        if next(calls) == 2:
            raise RuntimeError("out of memory")

    model.hook(third_fails)
    assert [tokens(items) for items in answers(worker, model, asked)] == [tokens(items) for items in whole]
    assert next(calls) > TOKENS
    assert sorted(passes) == passes and passes[-1] > passes[0], "the time of the last pass follows tokens"


def test_a_model_that_cannot_answer_a_good_request_either_ends_the_engine(worker: Worker, model: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    model.hook(broken)
    results = answers(worker, model, [request(text) for text in PROMPTS])
    assert all(isinstance(items[-1], EngineDead) for items in results)
    worker.join()
    assert "illegal memory access" in worker.last_error
    with pytest.raises(EngineDead):
        worker.put(model, BatchRow(request("red?"), TOKENS, lambda _: None))


def test_logits_that_are_not_finite_end_the_row_and_not_the_engine(worker: Worker, model: Any) -> None:
    def spoil(_: nn.Module, __: Any, out: Any) -> None:
        out.logits.fill_(torch.nan)

    hook = model.register_forward_hook(spoil)
    try:
        results = answers(worker, model, [request("red?"), request("what is this?", 1.0)])
    finally:
        hook.remove()
    assert all(isinstance(items[-1], AdapterError) and len(items) == 1 for items in results)
    assert len(answers(worker, model, [request("red?")])[0]) >= 1
    assert worker.last_error == ""


async def test_requests_whose_callers_went_away_leave_the_queue(base: VlmBase) -> None:
    engine = TransformersEngine(base, Serve())
    await engine.start()
    worker, busy, go = engine._working(), threading.Event(), threading.Event()

    def stand_still(*_: Any) -> None:
        busy.set()
        assert go.wait(120)

    hook = engine._model.register_forward_pre_hook(stand_still)
    tasks = [asyncio.ensure_future(engine.reply(request("red?"), None))]
    try:
        await asyncio.to_thread(busy.wait, 60)
        tasks += [asyncio.ensure_future(engine.reply(request("red?"), None)) for _ in range(5)]
        await until(lambda: len(worker._rows) == 5)
        for task in tasks[:3]:
            task.cancel()
        await asyncio.gather(*tasks[:3], return_exceptions=True)
        assert (len(worker._rows), engine.running()) == (3, 3)
    finally:
        hook.remove()
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        await engine.close()


async def test_a_scoring_whose_caller_went_away_is_not_computed_or_held(worker: Worker, model: Any) -> None:
    busy, go, passes = threading.Event(), threading.Event(), list[None]()

    def stand_still(*_: Any) -> None:
        passes.append(None)
        busy.set()
        assert go.wait(120)

    model.hook(stand_still)
    first = asyncio.ensure_future(worker.score(model, request("red?"), ["a"]))
    await asyncio.to_thread(busy.wait, 60)
    left = request("blue?")
    gone = asyncio.ensure_future(worker.score(model, left, ["a"]))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    del gone
    held = [each for each in gc.get_referrers(left) if isinstance(each, (list, tuple))]
    go.set()
    assert held == [], "its images"
    assert len(await first) == 1
    assert len(await worker.score(model, request("red?"), ["a"])) == 1
    assert len(passes) == 2
