from __future__ import annotations

import asyncio
import gc
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from core.errors import AdapterError
from core.settings.serving import Serve
from serving.engines.vlm.generation import GenerationRequest, Message
from serving.engines.vlm.hf_engine import BatchRow, TransformersEngine, Worker
from serving.engines.vlm.prompts import end_token
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead, InvalidRequest
from tests.support.tiny_vlm import tiny_vlm_base
from tests.support.waiting import until

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
    assert held == []
    assert len(await first) == 1
    assert len(await worker.score(model, request("red?"), ["a"])) == 1
    assert len(passes) == 2
