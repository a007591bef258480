"""Both real VLM engines against transformers + PEFT, which is asked one question at a time."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import random
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from benchmarks.vllm_server import flags
from core.errors import AdapterError
from core.settings.serving import Serve
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, Message, TokenChunk, question
from serving.engines.vlm.open import SyncVlm, VlmEngine, open_engine
from serving.engines.vlm.vllm_start import import_vllm
from serving.engines.vlm.vlm_base import VlmBase
from serving.errors import EngineDead, InvalidRequest
from tests.support.tiny_vlm import tiny_vlm_adapter, tiny_vlm_base
from tests.support.vlm_reference import Peft, Reference, picture, some_asks
from tests.support.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")
CLOSE = 1e-4
SAFE_MARGIN = 3e-3
"""Every correct engine makes the same greedy choice when its margin is at least this."""
PARTS = (("text",), ("text", "image", "connector"), ("image", "connector"))


@dataclass
class VlmCases:
    """Requests and their expected answers."""

    base: VlmBase
    directories: dict[str, Path]
    """By name, in the order of :data:`PARTS`."""
    asks: list[GenerationRequest]
    references: dict[str | None, list[Reference]]
    models: dict[str | None, Peft]

    @property
    def names(self) -> list[str]:
        return list(self.directories)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> VlmCases:
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("vlm")
    base = tiny_vlm_base(home)
    directories = {}
    for seed, parts in enumerate(PARTS, 1):
        directory = home / f"adapter-{seed}"
        directories[tiny_vlm_adapter(base, directory, seed, parts=parts)] = directory
    models: dict[str | None, Peft] = {None: Peft(base)}
    models |= {name: Peft(base, directory) for name, directory in directories.items()}
    asks = some_asks(16)
    answers = {name: [model.greedy(ask) for ask in asks] for name, model in models.items()}
    # Tests that look for mixed-up adapters see one only if no two of them give the same answer.
    kept = [
        i
        for i in range(len(asks))
        if all(answers[name][i].margin > SAFE_MARGIN for name in models)
        and len({answers[name][i].tokens for name in models}) == len(models)
    ]
    assert len(kept) >= 6
    references = {name: [answers[name][i] for i in kept] for name in models}
    return VlmCases(base, directories, [asks[i] for i in kept], references, models)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["vllm", "transformers"])
async def engine(request: pytest.FixtureRequest, cases: VlmCases) -> AsyncIterator[VlmEngine]:
    engine = open_engine(cases.base, Serve(vlm_batch=8), kind=request.param)
    await engine.start()
    yield engine
    await engine.close()


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


async def test_choices_and_turns_with_no_image_one_or_two_have_their_log_probabilities(
    loaded: VlmEngine, cases: VlmCases
) -> None:
    choices = ["yes", "no", "a round apple"]
    for name, model in cases.models.items():
        wanted = [model.score(cases.asks[0], choice) for choice in choices]
        np.testing.assert_allclose(await loaded.score(cases.asks[0], choices, name), wanted, atol=CLOSE)
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
        for reply, ask in zip(await asyncio.gather(*[loaded.reply(ask, name) for ask in asks]), asks, strict=True):
            np.testing.assert_allclose(reply.logprobs, cases.models[name].greedy(ask).logprobs, atol=CLOSE)


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
    assert wrong == [] and answered >= 120


async def test_an_adapter_stays_until_its_last_request_has_ended(loaded: VlmEngine, cases: VlmCases) -> None:
    name = cases.names[0]
    ask = replace(cases.asks[0], max_tokens=100)
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
    streams = [loaded.stream(replace(cases.asks[0], max_tokens=200), None) for _ in range(8)]
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
        return replace(cases.asks[i], temperature=1.0, top_p=0.9, seed=seed, max_tokens=12)

    alone = await engine.reply(ask(3), None)
    crowd = await asyncio.gather(*[engine.reply(ask(seed, i), None) for i, seed in enumerate((1, 3, 4))])
    together = await asyncio.gather(engine.reply(ask(3), None), *[engine.reply(ask(s), None) for s in (5, 6, 7)])
    assert together[0].tokens == alone.tokens
    assert len({reply.tokens for reply in together}) == 4
    assert crowd[1].tokens != alone.tokens  # another picture


async def test_a_stop_string_ends_the_answer_before_it(loaded: VlmEngine, cases: VlmCases) -> None:
    name, tried = cases.names[0], 0
    for ask in cases.asks:
        plain = await loaded.reply(replace(ask, max_tokens=24), name)
        letters = [i for i, letter in enumerate(plain.text) if letter.isascii() and letter.isprintable()]
        if not letters:
            continue
        at = letters[len(letters) // 2]
        stop = plain.text[at : at + 2]
        cut = await loaded.reply(replace(ask, max_tokens=24, stop=("never", stop)), name)
        assert (cut.text, cut.finish) == (plain.text[: plain.text.index(stop)], "stop")
        assert len(cut.tokens) <= len(plain.tokens)
        tried += 1
    assert tried > 0 and loaded.running() == 0


async def test_questions_that_cannot_be_answered_are_refused_and_answers_end_with_the_context(
    engine: VlmEngine, cases: VlmCases
) -> None:
    for impossible, why in (
        (question(picture(0), "which colour? " * 100), r"it may have 256 \(serve.vlm_context\)"),
        (question(picture(0), "what is <image>?"), "stands for an image"),
        (GenerationRequest((Message("user", ("what?",)),), (picture(0),)), "Use every image once"),
    ):
        with pytest.raises(InvalidRequest, match=why):
            await engine.reply(impossible, None)
    with pytest.raises(InvalidRequest, match=r"serve.vlm_context"):
        await engine.score(cases.asks[0], ["yes", "no " * 300], None)
    assert engine.running() == 0
    expected = cases.references[None][0].tokens
    assert (await engine.reply(cases.asks[0], None)).tokens == expected
    reply = await engine.reply(replace(cases.asks[0], max_tokens=10_000), None)
    assert reply.finish == "stop" or reply.prompt_tokens + len(reply.tokens) == 256
    assert len(reply.tokens) > len(expected)


async def test_an_answer_follows_its_schema_or_the_engine_says_that_it_cannot(
    engine: VlmEngine, cases: VlmCases
) -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}
    wanted = replace(cases.asks[0], max_tokens=80, json_schema=json.dumps(schema | {"additionalProperties": False}))
    if engine.kind == "transformers":
        with pytest.raises(InvalidRequest, match=r"serve\.vlm_engine") as caught:
            await engine.reply(wanted, None)
        assert caught.value.param == "response_format"
        return
    text = (await engine.reply(wanted, None)).text
    assert text in ('{"colour":"red"}', '{"colour":"blue"}'), "compact, and whole"
    streamed = "".join([chunk.text async for chunk in engine.stream(wanted, None)])
    assert streamed == text
    for wrong in ('{"type": "strng"}', '{"$ref": "#/nope"}', '{"pattern": "(a+)+(", "type": "string"}', "5", "["):
        with pytest.raises(InvalidRequest):
            await engine.reply(replace(wanted, json_schema=wrong), None)
    assert (await engine.reply(cases.asks[0], None)).tokens == cases.references[None][0].tokens, "the others go on"


async def test_golden_answers_tell_adapters_apart_and_refuse_what_is_not_finite(
    loaded: VlmEngine, cases: VlmCases, tmp_path: Path
) -> None:
    await loaded.unload(cases.names[2])
    seen = [await loaded.golden(name) for name in (None, *cases.names[:2])]
    assert len(set(seen)) == 3
    assert seen == [await loaded.golden(name) for name in (None, *cases.names[:2])]
    name = tiny_vlm_adapter(cases.base, tmp_path / "huge", 5, scale=1e37)
    with pytest.raises(AdapterError, match=r"not finite|overflow"):
        await loaded.load(name, tmp_path / "huge")
        await loaded.golden(name)


async def test_a_killed_engine_says_so_and_leaves_no_process(engine: VlmEngine, cases: VlmCases) -> None:
    """Must be the last test of an engine: it kills it."""
    if engine.kind != "vllm":
        pytest.skip("transformers has no process of its own")
    (core,) = multiprocessing.active_children()
    long = replace(cases.asks[0], max_tokens=200)
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
    for call in (
        engine.reply(long, None), engine.score(long, ["yes"], None), engine.golden(None),
        engine.load(cases.names[0], cases.directories[cases.names[0]]),
    ):  # fmt: skip
        with pytest.raises(EngineDead, match="Start a new engine"):
            await call
    assert engine.running() == 0
    await engine.close()
    await until(lambda: not multiprocessing.active_children())


async def test_a_blocking_facade_gives_replies_and_scores_in_order(cases: VlmCases) -> None:
    name = cases.names[1]
    with SyncVlm(open_engine(cases.base, Serve(), kind="transformers")) as vlm:
        vlm.load(name, cases.directories[name])
        replies = vlm.replies(cases.asks, name, label="answers")
        assert [reply.tokens for reply in replies] == [one.tokens for one in cases.references[name]]
        scores = vlm.scores(cases.asks[:2], [["yes", "no"], ["red"]], name)
        wanted = [[cases.models[name].score(cases.asks[0], one) for one in ("yes", "no")]]
        wanted.append([cases.models[name].score(cases.asks[1], "red")])
        assert scores == [pytest.approx(one, abs=1e-4) for one in wanted]
        assert vlm.golden(name) != vlm.golden(None)
        vlm.unload(name)
        assert vlm.engine.resident() == frozenset()
    assert vlm.engine.last_error() == "The engine was closed."


async def test_vllms_own_server_which_ratchet_is_compared_with_knows_every_flag(cases: VlmCases) -> None:
    import_vllm()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    (name, *_), serve = cases.names, Serve(vlm_max_rank=8)
    given = flags(cases.base, serve, name, cases.directories[name], 1)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
    assert [(module.name, module.path) for module in parsed.lora_modules] == [(name, str(cases.directories[name]))]
    assert (parsed.max_lora_rank, parsed.disable_log_stats) == (8, False)
