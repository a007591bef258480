"""Requests to the transformers engine whose clients go away before their turn."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from torch import nn

from core.settings.serving import Serve
from serving.engines.vlm import hf_engine, hf_worker
from serving.engines.vlm.generation import question
from serving.engines.vlm.hf_engine import TransformersEngine
from serving.engines.vlm.hf_worker import Worker


@pytest.mark.parametrize("kind", ["score", "reply"])
async def test_what_nobody_waits_for_leaves_the_queue(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    busy, go = threading.Event(), threading.Event()

    def stands_still(*_: Any) -> list[float]:
        busy.set()
        assert go.wait(120)
        return [0.0, 0.0]

    monkeypatch.setattr(hf_worker, "score", stands_still)
    monkeypatch.setattr(hf_worker, "answer", stands_still)
    monkeypatch.setattr(hf_engine, "Detokenizer", lambda *_: None)
    engine = TransformersEngine(cast(Any, SimpleNamespace(name="base")), Serve())
    monkeypatch.setattr(engine, "_length", lambda request, choices=(): 10)
    monkeypatch.setattr(engine, "_processor", SimpleNamespace(tokenizer=None))
    worker = Worker(None, frozenset(), 16, 1)
    monkeypatch.setattr(engine, "_worker", worker)

    async def build() -> nn.Module:
        return nn.Identity()

    await engine._residents.add("", build)

    def ask() -> asyncio.Task[Any]:
        asked = question(np.zeros((8, 8, 3), np.uint8), "what is this?")
        work = engine.score(asked, ["a", "b"], None) if kind == "score" else engine.reply(asked, None)
        return asyncio.create_task(cast(Any, work))

    async def waiting(count: int) -> None:
        async with asyncio.timeout(60):
            while len(worker._waiting) != count:
                await asyncio.sleep(0.01)

    try:
        first = ask()
        await asyncio.to_thread(busy.wait, 60)
        others = [ask() for _ in range(20)]
        await waiting(20)
        for task in [*others[:15], first]:
            task.cancel()
        await asyncio.gather(first, *others[:15], return_exceptions=True)
        assert len(worker._waiting) == 5
        assert engine.running() == 5
        for task in others[15:]:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert len(worker._waiting) == 0
    finally:
        worker.stop("the test is over.")
        go.set()
        await asyncio.to_thread(worker.join)
