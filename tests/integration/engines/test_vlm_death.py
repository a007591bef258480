"""What is left when vLLM's process is killed: errors that say so, no process, and a new engine that starts."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from ops.settings.serving import Serve
from serving.engines.vlm.generation import GenerationResult
from serving.engines.vlm.open import open_engine
from serving.engines.vlm.sync import SyncVlm
from serving.errors import EngineDead
from tests.integration.engines.conftest import VlmCases
from tests.support.waiting import until

pytestmark = pytest.mark.integration


def _engines() -> set[int]:
    """Processes that this one started, but for Python's own resource tracker, which stays."""
    mine = os.getpid()
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
            command = path.with_name("cmdline").read_text()
        except OSError:
            continue
        if int(fields[1]) == mine and fields[0] != "Z" and "resource_tracker" not in command:
            found.add(int(path.parent.name))
    return found


async def test_a_killed_engine_says_so_and_a_new_one_answers(cases: VlmCases) -> None:
    before = _engines()
    engine = open_engine(cases.base, Serve(), kind="vllm")
    await engine.start()
    (core,) = _engines() - before
    long = dataclasses.replace(cases.asks[0], max_tokens=200)
    waiting = [asyncio.create_task(engine.reply(long, None)) for _ in range(40)]
    stream = engine.stream(long, None)
    await anext(stream)
    os.kill(core, signal.SIGSTOP)  # so that what is asked of it from now on is not answered before it dies
    loading = asyncio.create_task(engine.load(cases.names[1], cases.directories[cases.names[1]]))
    await until(lambda: engine._engine.engine_core.utility_results)  # type: ignore[attr-defined]
    os.kill(core, signal.SIGKILL)
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
    assert core not in _engines()

    def again() -> list[GenerationResult]:
        with SyncVlm(open_engine(cases.base, Serve())) as vlm:
            vlm.load(cases.names[0], cases.directories[cases.names[0]])
            return vlm.replies(cases.asks, cases.names[0])

    replies = await asyncio.to_thread(again)
    assert [reply.tokens for reply in replies] == [one.tokens for one in cases.references[cases.names[0]]]
    end = time.monotonic() + 20  # a process that is ending may take its time on a busy machine
    while (left := _engines() - before) and time.monotonic() < end:
        await asyncio.sleep(0.2)
    assert not left


def test_a_blocking_facade_gives_replies_and_scores_in_order(cases: VlmCases) -> None:
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
