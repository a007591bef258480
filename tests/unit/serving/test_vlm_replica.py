"""A VLM's replica around an engine in memory, which answers with its adapter's name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import Mock

import pytest

from core.artifacts import Artifacts
from core.errors import AdapterError
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, Message, TokenChunk, whole
from serving.errors import EngineDead, InvalidRequest
from serving.messages import Refusal
from serving.replicas import forward_health
from serving.replicas.vlm import STALL_SECONDS, VlmWorker, coalesce
from tests.support.clock import Clock
from tests.support.waiting import until

ASK = GenerationRequest((Message("user", ("is it?",)),))
PLACES = 4
SOON = 60.0


@dataclass
class MemoryVlm:
    """Holds at most ``PLACES`` adapters. ``gate`` delays answers; ``bad`` adapters fail golden inputs."""

    kind: Literal["vllm", "transformers"] = "transformers"
    precision = "float32"
    base: Any = field(default_factory=lambda: SimpleNamespace(name="memory"))
    names: set[str] = field(default_factory=set)
    bad: set[str] = field(default_factory=set)
    loads: list[str] = field(default_factory=list)
    gate: asyncio.Event | None = None
    dead: str = ""
    inside: int = 0
    passed_at: float = 0.0

    async def load(self, name: str, directory: Path) -> None:
        if not (directory / "adapter_model.safetensors").is_file():
            raise AdapterError(f"{directory} is no adapter directory.")
        if len(self.names) >= PLACES:
            raise AdapterError(f"there is no room for {name}.")
        await asyncio.sleep(0)
        self.names.add(name)
        self.loads.append(name)

    async def unload(self, name: str) -> None:
        await asyncio.sleep(0)
        self.names.discard(name)

    def resident(self) -> frozenset[str]:
        return frozenset(self.names)

    async def stream(self, ask: GenerationRequest, adapter: str | None) -> AsyncIterator[TokenChunk]:
        words = self._words(ask, adapter)
        self.inside += 1
        try:
            for index, word in enumerate(words):
                if self.gate is not None:
                    await self.gate.wait()
                last = index == len(words) - 1
                yield TokenChunk(word, (index,), (-0.5,), 7, index + 1, "stop" if last else "")
        finally:
            self.inside -= 1

    async def reply(self, ask: GenerationRequest, adapter: str | None) -> GenerationResult:
        return await whole(self.stream(ask, adapter))

    async def score(self, ask: GenerationRequest, choices: Sequence[str], adapter: str | None) -> list[float]:
        self._words(ask, adapter)
        return [-float(len(choice)) for choice in choices]

    async def golden(self, adapter: str | None) -> str:
        if adapter in self.bad:
            raise AdapterError(f"{adapter}: log-probabilities are not finite.")
        return f"golden-{adapter}"

    def running(self) -> int:
        return self.inside

    def last_error(self) -> str:
        return self.dead

    def _words(self, ask: GenerationRequest, adapter: str | None) -> list[str]:
        if self.dead:
            raise EngineDead(self.dead)
        if adapter is not None and adapter not in self.names:
            raise AdapterError(f"{adapter} is not resident.")
        if ask.max_tokens > 100:
            raise InvalidRequest("too many tokens.", "Ask for fewer.")
        return [adapter or "base", " ", "says", " ", "yes"]


@pytest.fixture
def engine() -> MemoryVlm:
    return MemoryVlm()


@pytest.fixture
def worker(engine: MemoryVlm, artifacts: Artifacts) -> VlmWorker:
    return VlmWorker(engine, artifacts, "r1", PLACES, batch=2)


async def ask(worker: VlmWorker, adapter: str | None, seconds: float = SOON) -> str:
    answer = await worker.reply(ASK, adapter, seconds)
    return answer.text if isinstance(answer, GenerationResult) else answer.code


async def words(worker: VlmWorker, adapter: str | None, seconds: float = SOON) -> list[str]:
    return [
        chunk.text if isinstance(chunk, TokenChunk) else chunk.code
        async for chunk in worker.stream(ASK, adapter, seconds)
    ]


async def test_answers_come_from_the_adapter_that_was_asked_for(worker: VlmWorker) -> None:
    for adapter in ("a", None):
        assert await ask(worker, adapter) == "".join(await words(worker, adapter)) == f"{adapter or 'base'} says yes"
    assert await worker.score(ASK, ["yes", "no"], "a", SOON) == [-3.0, -2.0]


async def test_prepare_loads_once_and_takes_away_nothing_served(worker: VlmWorker, engine: MemoryVlm) -> None:
    for _ in range(2):
        assert (await worker.prepare("a")).error == ""
    assert engine.loads == ["a"]
    engine.bad.add("b")
    assert "not finite" in (await worker.prepare("b")).error
    assert "nowhere" in (await worker.prepare("nowhere")).error
    assert engine.resident() == {"a"}
    await ask(worker, "c")
    await worker.adopt(["c"])
    engine.bad.add("c")
    assert (await worker.prepare("c")).error
    assert "c" in engine.resident()


async def test_what_is_retired_goes_after_its_last_request_and_comes_back(worker: VlmWorker, engine: MemoryVlm) -> None:
    await worker.prepare("a")
    await worker.prepare("b")
    engine.gate = asyncio.Event()
    asked = asyncio.create_task(ask(worker, "a"))
    await until(engine.running)
    assert await worker.retire(["b"]) == []
    assert engine.resident() == {"a", "b"}
    engine.gate.set()
    assert (await asked).startswith("a ")
    await until(lambda: engine.resident() == {"b"})
    assert (await ask(worker, "a")).startswith("a ")
    await until(lambda: engine.resident() == {"b"})


async def test_what_is_being_prepared_is_not_swept_before_it_is_adopted(worker: VlmWorker, engine: MemoryVlm) -> None:
    await worker.adopt(["a"])
    await worker.prepare("a")
    await worker.prepare("b")
    await ask(worker, "c")
    await until(lambda: engine.resident() == {"a", "b"})
    await worker.adopt(["b", "a"])
    await ask(worker, "b")
    await asyncio.sleep(0.01)
    assert engine.resident() == {"a", "b"}
    assert engine.loads == ["a", "b", "c"]  # none was swept and loaded again


async def test_a_full_engine_drops_idle_ones_and_waits_for_busy_ones(worker: VlmWorker, engine: MemoryVlm) -> None:
    await worker.adopt(["a", "b"])
    for name in ("a", "b"):
        await worker.prepare(name)
    engine.gate = asyncio.Event()
    busy = [asyncio.create_task(ask(worker, name)) for name in ("c", "d")]
    await until(lambda: engine.running() == 2)
    assert engine.resident() == {"a", "b", "c", "d"}
    coming = asyncio.create_task(worker.prepare("e"))
    await asyncio.sleep(0.05)
    assert not coming.done()
    engine.gate.set()
    await asyncio.gather(*busy)
    assert (await coming).error == ""
    assert {"a", "b", "e"} <= engine.resident()


async def test_swaps_under_requests_never_answer_with_another_adapter(worker: VlmWorker, engine: MemoryVlm) -> None:
    asked: list[tuple[str, asyncio.Task[str]]] = []
    for number in range(20):
        now, before = "abcdef"[number % 6], "abcdef"[(number - 1) % 6]
        assert (await worker.prepare(now)).error == ""
        await worker.adopt([now, before])
        asked += [(name, asyncio.create_task(ask(worker, name))) for name in (now, before, now)]
        await asyncio.sleep(0)
        await worker.retire([now, before])
    assert [await answer for _, answer in asked] == [f"{name} says yes" for name, _ in asked]
    assert len(engine.resident()) <= PLACES


async def test_expected_failures_are_values_and_a_dead_engine_is_raised(worker: VlmWorker, engine: MemoryVlm) -> None:
    assert await ask(worker, None, -1.0) == "late"
    too_long = await worker.reply(GenerationRequest(ASK.messages, max_tokens=1000), None, SOON)
    assert too_long == Refusal("ask", "too many tokens.", "Ask for fewer.")
    missing = await worker.score(ASK, ["x"], "nowhere", SOON)
    assert isinstance(missing, Refusal) and missing.code == "adapter"
    assert await words(worker, "nowhere") == ["adapter"]
    engine.dead = "killed"
    for call in (ask, words):
        with pytest.raises(EngineDead):
            await call(worker, None)


async def test_late_answers_and_closed_streams_leave_the_engine(worker: VlmWorker, engine: MemoryVlm) -> None:
    engine.gate = asyncio.Event()
    assert await ask(worker, None, 0.05) == "late"
    assert await words(worker, None, 0.05) == ["late"]
    assert (engine.running(), (await worker.status())["waiting"]) == (0, 0)
    engine.gate.set()
    stream = worker.stream(ASK, None, SOON)
    assert isinstance(await anext(stream), TokenChunk)
    engine.gate.clear()
    await stream.aclose()  # type: ignore[attr-defined]
    assert engine.running() == 0


async def test_answers_that_fail_again_and_again_make_a_replica_unhealthy(
    worker: VlmWorker, engine: MemoryVlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    await worker.check_health()
    monkeypatch.setattr(engine, "_words", Mock(side_effect=ValueError("the device answers nonsense")))
    for _ in range(2):
        with pytest.raises(ValueError, match="nonsense"):
            await ask(worker, None)
    with pytest.raises(RuntimeError, match="3 forward passes in a row failed: ValueError"):
        await worker.check_health()
    monkeypatch.undo()
    await worker.check_health()  # what passes by itself is no reason to be replaced


async def test_a_busy_replica_is_healthy_and_says_that_it_is_busy_until_its_engine_hangs(
    worker: VlmWorker, engine: MemoryVlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(forward_health, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(forward_health, "PROBE_LIMIT_SECONDS", 0.01)
    assert isinstance(await worker.probe(None, SOON), GenerationResult)
    engine.gate = asyncio.Event()
    waiting = asyncio.create_task(ask(worker, None))  # gets no answer
    await until(lambda: engine.running())

    async def probed(seconds: float) -> str:
        answer = await worker.probe(None, seconds)
        return answer.code if isinstance(answer, Refusal) else "answered"

    for _ in range(5):
        clock.now += STALL_SECONDS
        engine.passed_at = clock.now  # though its requests are late, its passes end
        await worker.check_health()
        assert await probed(SOON) == "busy"
    clock.now += STALL_SECONDS
    assert await probed(0.05) == "late"
    with pytest.raises(RuntimeError, match="3 forward passes in a row failed"):
        for _ in range(3):
            await worker.check_health()
    waiting.cancel()


async def test_what_is_ready_at_the_same_moment_travels_as_one_chunk() -> None:
    async def source() -> object:
        for index in range(6):
            yield TokenChunk(str(index), (index,), (-float(index),), 1, index + 1, "stop" if index == 5 else "")
            if index == 0:
                await asyncio.sleep(0.01)

    chunks = []
    async for chunk in coalesce(source(), 5):  # type: ignore[arg-type]
        chunks.append(chunk)
        await asyncio.sleep(0.03)
    assert chunks == [
        TokenChunk("0", (0,), (0.0,), 1, 1),
        TokenChunk("12345", (1, 2, 3, 4, 5), (-1.0, -2.0, -3.0, -4.0, -5.0), 1, 6, "stop"),
    ]
