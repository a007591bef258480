"""Both real VLM engines against transformers + PEFT, which is asked one question at a time."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from core.errors import AdapterError
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, Message, TokenChunk, question
from serving.engines.vlm.open import VlmEngine
from serving.errors import EngineDead, InvalidRequest
from tests.integration.engines.conftest import VlmCases
from tests.support.tiny_vlm import tiny_vlm_adapter
from tests.support.vlm_reference import picture
from tests.support.waiting import until

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
CLOSE = 1e-4


@pytest_asyncio.fixture(loop_scope="module")
async def loaded(engine: VlmEngine, cases: VlmCases) -> AsyncIterator[VlmEngine]:
    """The engine with the three adapters loaded; they are unloaded when the test ends."""
    for name, directory in cases.directories.items():
        await engine.load(name, directory)
    yield engine
    for name in engine.resident():
        await engine.unload(name)


async def test_mixed_batches_give_each_request_the_answer_of_transformers_and_peft(
    loaded: VlmEngine, cases: VlmCases
) -> None:
    chance = random.Random(0)
    for _ in range(10):
        mix = [(chance.choice([None, *cases.names]), chance.randrange(len(cases.asks))) for _ in range(8)]
        replies = await asyncio.gather(*[loaded.reply(cases.asks[i], name) for name, i in mix])
        for (name, i), reply in zip(mix, replies, strict=True):
            assert reply.tokens == cases.references[name][i].tokens, (name, i)
            np.testing.assert_allclose(reply.logprobs, cases.references[name][i].logprobs, atol=CLOSE)
    assert loaded.running() == 0


async def test_scores_of_choices_are_those_of_transformers_and_peft(loaded: VlmEngine, cases: VlmCases) -> None:
    choices = ["yes", "no", "a round apple"]
    ask = cases.asks[0]
    for name, model in cases.models.items():
        wanted = [model.score(ask, choice) for choice in choices]
        np.testing.assert_allclose(await loaded.score(ask, choices, name), wanted, atol=CLOSE)


async def test_a_stream_is_the_reply_in_chunks(loaded: VlmEngine, cases: VlmCases) -> None:
    for name in (None, cases.names[0]):
        reply = await loaded.reply(cases.asks[1], name)
        chunks: list[TokenChunk] = []
        while len(chunks) < 2:  # tokens that came before they were read are one chunk
            chunks = [chunk async for chunk in loaded.stream(cases.asks[1], name)]
        assert "".join(chunk.text for chunk in chunks) == reply.text
        assert tuple(token for chunk in chunks for token in chunk.tokens) == reply.tokens
        assert [chunk.finish for chunk in chunks] == [""] * (len(chunks) - 1) + [reply.finish]
        assert chunks[-1].completion_tokens == len(reply.tokens)
        assert chunks[-1].prompt_tokens == reply.prompt_tokens


async def test_adapters_are_swapped_under_traffic_without_a_failure_or_a_mix(
    loaded: VlmEngine, cases: VlmCases
) -> None:
    live, wrong, answered, over = cases.names[0], [], 0, False

    async def client(seed: int) -> None:
        nonlocal answered
        chance = random.Random(seed)
        while not over:
            name, i = chance.choice([None, live]), chance.randrange(len(cases.asks))
            reply = await loaded.reply(cases.asks[i], name)
            answered += 1
            if reply.tokens != cases.references[name][i].tokens:
                wrong.append((name, i))

    clients = [asyncio.create_task(client(seed)) for seed in range(6)]
    await loaded.unload(cases.names[2])
    for swap in range(20):
        old, new = cases.names[swap % 2], cases.names[(swap + 1) % 2]
        await loaded.load(new, cases.directories[new])
        before, live = answered, new
        await loaded.unload(old)
        while answered < before + 6:
            await asyncio.sleep(0.005)
        assert loaded.resident() == {new}
    over = True
    await asyncio.gather(*clients)
    assert wrong == []
    assert answered >= 120


async def test_an_adapter_stays_until_its_last_request_has_ended(loaded: VlmEngine, cases: VlmCases) -> None:
    name = cases.names[0]
    ask = dataclasses.replace(cases.asks[0], max_tokens=100)
    whole = await loaded.reply(ask, name)
    chunks = loaded.stream(ask, name)
    first = await anext(chunks)
    leaving = asyncio.create_task(loaded.unload(name))
    await asyncio.sleep(0)
    assert name not in loaded.resident()
    with pytest.raises(AdapterError, match="is not resident"):
        await loaded.reply(ask, name)
    rest = [chunk async for chunk in chunks]
    assert (*first.tokens, *[token for chunk in rest for token in chunk.tokens]) == whole.tokens
    await leaving


async def test_a_stream_that_is_closed_early_frees_its_slot(loaded: VlmEngine, cases: VlmCases) -> None:
    endless = [dataclasses.replace(ask, max_tokens=200) for ask in [cases.asks[0]] * 8]
    streams = [loaded.stream(ask, None) for ask in endless]
    await asyncio.gather(*[anext(stream) for stream in streams])
    assert loaded.running() == 8
    for stream in streams:
        await stream.aclose()
    assert loaded.running() == 0
    name = cases.names[1]
    replies = await asyncio.gather(*[loaded.reply(cases.asks[i % 4], name) for i in range(16)])
    assert [reply.tokens for reply in replies] == [cases.references[name][i % 4].tokens for i in range(16)]


async def test_sampling_with_a_seed_is_repeatable_in_any_company(engine: VlmEngine, cases: VlmCases) -> None:
    def ask(seed: int, i: int = 0) -> GenerationRequest:
        return dataclasses.replace(cases.asks[i], temperature=1.0, top_p=0.9, seed=seed, max_tokens=12)

    alone = await engine.reply(ask(3), None)
    crowd = await asyncio.gather(*[engine.reply(ask(seed, i), None) for i, seed in enumerate((1, 3, 4))])
    together = await asyncio.gather(engine.reply(ask(3), None), *[engine.reply(ask(s), None) for s in (5, 6, 7)])
    assert together[0].tokens == alone.tokens
    assert len({reply.tokens for reply in together}) == 4
    assert crowd[1].tokens != alone.tokens  # another picture


async def test_a_stop_string_ends_the_answer_before_it(loaded: VlmEngine, cases: VlmCases) -> None:
    name = cases.names[0]
    for ask in cases.asks:
        plain = await loaded.reply(dataclasses.replace(ask, max_tokens=24), name)
        letters = [i for i, letter in enumerate(plain.text) if letter.isascii() and letter.isprintable()]
        if not letters:
            continue
        at = letters[len(letters) // 2]
        stop = plain.text[at : at + 2]
        cut = await loaded.reply(dataclasses.replace(ask, max_tokens=24, stop=("never", stop)), name)
        assert cut.text == plain.text[: plain.text.index(stop)]
        assert cut.finish == "stop"
        assert len(cut.tokens) <= len(plain.tokens)
    assert loaded.running() == 0


async def test_questions_that_cannot_be_answered_are_refused_and_the_next_is_answered(
    engine: VlmEngine, cases: VlmCases
) -> None:
    long = question(picture(0), "which colour? " * 100)
    with pytest.raises(InvalidRequest, match=r"it may have 256 \(serve.vlm_context\)"):
        await engine.reply(long, None)
    with pytest.raises(InvalidRequest, match=r"serve.vlm_context"):
        await engine.score(cases.asks[0], ["yes", "no " * 300], None)
    with pytest.raises(InvalidRequest, match="stands for an image"):
        await engine.reply(question(picture(0), "what is <image>?"), None)
    with pytest.raises(InvalidRequest, match="Use every image once"):
        await engine.reply(GenerationRequest((Message("user", ("what?",)),), (picture(0),)), None)
    assert engine.running() == 0
    assert (await engine.reply(cases.asks[0], None)).tokens == cases.references[None][0].tokens


async def test_an_answer_longer_than_the_context_ends_there(engine: VlmEngine, cases: VlmCases) -> None:
    reply = await engine.reply(dataclasses.replace(cases.asks[0], max_tokens=10_000), None)
    if reply.finish == "length":
        assert reply.prompt_tokens + len(reply.tokens) == 256
    assert len(reply.tokens) > len(cases.references[None][0].tokens)


async def test_requests_without_an_image_with_two_and_with_turns_are_those_of_transformers(
    loaded: VlmEngine, cases: VlmCases
) -> None:
    turns = (
        Message("system", ("be short",)),
        Message("user", (0, "and", 1, "same?")),
        Message("assistant", ("no",)),
        Message("user", ("which colour?",)),
    )
    asks = [
        GenerationRequest((Message("user", ("what is red?",)),), max_tokens=4),
        GenerationRequest(turns, (picture(1), picture(2, 50)), max_tokens=4),
        GenerationRequest(turns, (picture(3, 90), np.zeros((20, 44, 3), np.uint8)), max_tokens=4),
    ]
    for name in (None, cases.names[1]):
        replies = await asyncio.gather(*[loaded.reply(ask, name) for ask in asks])
        for reply, ask in zip(replies, asks, strict=True):
            np.testing.assert_allclose(reply.logprobs, cases.models[name].greedy(ask).logprobs, atol=CLOSE)


async def test_golden_answers_tell_adapters_apart_and_refuse_what_is_not_finite(
    loaded: VlmEngine, cases: VlmCases, tmp_path: Path
) -> None:
    await loaded.unload(cases.names[2])
    seen = [await loaded.golden(name) for name in (None, *cases.names[:2])]
    assert len(set(seen)) == 3
    assert seen == [await loaded.golden(name) for name in (None, *cases.names[:2])]
    huge = tmp_path / "huge"
    name = tiny_vlm_adapter(cases.base, huge, 5, scale=1e37)
    with pytest.raises(AdapterError, match=r"not finite|overflow"):
        await loaded.load(name, huge)
        await loaded.golden(name)


async def test_a_killed_engine_says_so_and_leaves_no_process(engine: VlmEngine, cases: VlmCases) -> None:
    """Must be the last test of an engine: it kills it."""
    if engine.kind != "vllm":
        pytest.skip("transformers has no process of its own")
    (core,) = multiprocessing.active_children()
    long = dataclasses.replace(cases.asks[0], max_tokens=200)
    waiting = [asyncio.create_task(engine.reply(long, None)) for _ in range(40)]
    stream = engine.stream(long, None)
    await anext(stream)
    os.kill(core.pid, signal.SIGSTOP)  # so that later requests are not answered before it dies
    loading = asyncio.create_task(engine.load(cases.names[1], cases.directories[cases.names[1]]))
    await until(lambda: engine._engine.engine_core.utility_results)  # type: ignore[attr-defined]
    core.kill()
    with pytest.raises(EngineDead):
        await asyncio.wait_for(loading, 30)
    ended = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 30)
    assert all(isinstance(one, EngineDead | GenerationResult) for one in ended)
    assert any(isinstance(one, EngineDead) for one in ended)
    with pytest.raises(EngineDead):
        async for _ in stream:
            pass
    assert "process ended" in engine.last_error()
    for call in (engine.reply(long, None), engine.score(long, ["yes"], None), engine.golden(None)):
        with pytest.raises(EngineDead, match="Start a new engine"):
            await call
    with pytest.raises(EngineDead):
        await engine.load(cases.names[0], cases.directories[cases.names[0]])
    assert engine.running() == 0
    await engine.close()
    await until(lambda: not multiprocessing.active_children())
