from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from core import priority
from core.artifacts import Artifacts
from core.errors import ArtifactsUnavailable
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import ClipBase
from serving.engines.tokens import BoundedTokenizer, vocabulary
from serving.messages import EncodeRequest, EncodeResult, Modality
from serving.releases.types import Prepared
from serving.replicas import encoder as module
from serving.replicas.encoder import EncoderWorker
from tests.support.tiny import tiny_adapter, tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ClipBase:
    return tiny_base(tmp_path_factory.mktemp("home"))


class Worker(EncoderWorker):
    """An encoder with its own artifacts."""

    artifacts: Artifacts

    def __init__(self, base: ClipBase, folder: Path, engine: Any = None) -> None:
        self.folder = folder
        super().__init__(engine or ClipEngine(base), Artifacts(str(folder / "artifacts")), "r1")

    def stored(self, seed: int) -> str:
        name = tiny_adapter(self.engine.base, self.folder / str(seed), seed)
        self.artifacts.put_directory(self.folder / str(seed), f"adapters/{name}")
        return name

    async def encode_texts(self, *texts: str, adapter: str | None = None) -> list[EncodeResult]:
        return await self.encode_batch([EncodeRequest("text", ids(text), adapter, soon()) for text in texts or ("x",)])


@pytest.fixture
def worker(base: ClipBase, tmp_path: Path) -> Worker:
    return Worker(base, tmp_path)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def ids(*texts: str) -> list[list[int]]:
    return BoundedTokenizer(vocabulary(), 16).rows(texts)


def soon() -> float:
    return time.monotonic() + 60


@pytest.mark.parametrize("kind", ["image", "text"])
async def test_a_batch_answers_each_request_under_its_adapter(worker: Worker, kind: Modality) -> None:
    payloads: list[Any] = [pixels(2), pixels(1, 1)] if kind == "image" else [ids("a cat", "a dog"), ids("a bird")]
    alone = ClipEngine(worker.engine.base)
    encode: Any = alone.encode_images if kind == "image" else alone.encode_tokens
    for name in (None, worker.stored(1), worker.stored(2)):
        if name is not None:
            alone.load(name, worker.artifacts.fetch(f"adapters/{name}"))
        answers = await worker.encode_batch([EncodeRequest(kind, payload, name, soon()) for payload in payloads])
        for payload, answer in zip(payloads, answers, strict=True):
            assert answer.adapter == name
            np.testing.assert_allclose(answer.vectors, encode(payload, name), atol=1e-5)


async def test_an_adapter_is_loaded_by_the_request_for_it(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    name = worker.stored(3)
    (answer,) = await worker.encode_texts(adapter=name)
    assert answer.code == "" and (await worker.status())["resident"] == [name]
    returned: list[None] = []
    monkeypatch.setattr(module, "return_free_memory", lambda: returned.append(None))
    assert await worker.retire([None]) == [name]
    assert len(returned) == 1, "its memory goes back to the system"
    assert await worker.retire([None]) == [] and len(returned) == 1
    (again,) = await worker.encode_texts(adapter=name)
    np.testing.assert_array_equal(again.vectors, answer.vectors)
    (missing,) = await worker.encode_texts(adapter="clip-000000000000")
    assert (missing.code, missing.vectors) == ("adapter", None)


async def test_hanging_artifacts_hold_up_only_what_is_missing(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    fetching, answers = threading.Event(), threading.Event()

    def fetch(key: str) -> Path:
        fetching.set()
        answers.wait(30)
        raise ArtifactsUnavailable("the store was stopped.")

    monkeypatch.setattr(worker.artifacts, "fetch", fetch)
    await worker.prepare(None)
    missing = asyncio.create_task(worker._load_missing("clip-000000000000"))
    await asyncio.to_thread(fetching.wait, 30)
    assert await worker._load_missing(None) is None
    assert (await worker.prepare(None)).image_space
    (answer,) = await worker.encode_texts()
    assert answer.vectors is not None and not missing.done()
    answers.set()
    refusal = await missing
    assert refusal is not None and refusal.code == "adapter" and "was stopped" in refusal.error


async def test_prepare_tells_spaces_and_says_what_is_wrong_with_a_damaged_file(worker: Worker) -> None:
    good, bad = worker.stored(4), worker.stored(5)
    weights = worker.artifacts.fetch(f"adapters/{bad}") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    prepared = await worker.prepare(good)
    assert (prepared.error, prepared.image_space) == ("", worker.engine.spaces(good).image)
    assert (await worker.prepare(bad)).error
    assert bad not in worker.engine.resident


async def test_a_request_whose_forward_pass_fails_is_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, poison = worker.engine.encode_tokens, ids("poison")[0]

    def poisoned(rows: list[list[int]], adapter: str | None = None) -> np.ndarray:
        if poison in rows:
            raise ValueError("index out of range")
        return encode(rows, adapter)

    monkeypatch.setattr(worker.engine, "encode_tokens", poisoned)
    answers = await worker.encode_texts("a", "poison", "b")
    assert [answer.code for answer in answers] == ["", "failed", ""]
    assert "index out of range" in answers[1].error
    for _ in range(5):
        await worker.encode_texts("poison")
    await worker.check_health()  # its own pass works: the requests were at fault


async def test_an_encoder_that_lost_its_device_is_unhealthy(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    lost = Mock(side_effect=RuntimeError("CUDA error: an illegal memory access was encountered"))
    await worker.check_health()
    monkeypatch.setattr(worker.engine, "encode_tokens", lost)
    with pytest.raises(RuntimeError, match="CUDA error"):  # so that the call is made again on another replica
        await worker.encode_texts("x", "y")
    with pytest.raises(RuntimeError, match="does not work any more"):
        await worker.check_health()


async def test_retiring_does_not_hold_up_requests_while_an_adapter_is_loaded(worker: Worker) -> None:
    with worker._lock:  # as a thread that loads an adapter does
        worker.engine._residents["clip-old"] = worker.engine._none
        retiring = asyncio.create_task(worker.retire([None]))
        (answer,) = await worker.encode_texts()
        assert answer.vectors is not None and not retiring.done()
    assert await retiring == ["clip-old"]


async def test_background_calls_take_turns_chunk_by_chunk(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most = 0, 0
    compute, submit = worker.encode_now, asyncio.get_running_loop().run_in_executor

    def counted(requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        nonlocal inside
        try:
            return compute(requests)
        finally:
            inside -= 1

    def submitted(pool: Any, function: Any, *arguments: Any) -> Any:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        return submit(pool, function, *arguments)

    monkeypatch.setattr(worker, "encode_now", counted)
    monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", submitted)
    answers = await asyncio.gather(*(worker.encode_background("image", pixels(10, seed), None) for seed in range(3)))
    assert most == 1, "a request that comes now waits for one chunk"
    for seed, answer in enumerate(answers):
        np.testing.assert_allclose(answer.vectors, worker.engine.encode_images(pixels(10, seed)), atol=1e-5)


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="only Linux has it")
async def test_a_load_gives_way_while_requests_come_and_not_when_one_waits_for_it_or_it_takes_long(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BUSY_SECONDS", "PACED_SECONDS"):
        monkeypatch.setattr(module, name, 600.0)
    rests: list[float] = []
    policies: list[int] = []
    monkeypatch.setattr(priority, "time", SimpleNamespace(sleep=rests.append, thread_time=time.thread_time))
    golden, (first, second, third, fourth, fifth) = worker.engine.golden, map(worker.stored, range(1, 6))

    def noting(adapter: str | None) -> dict[str, Any]:
        policies.append(os.sched_getscheduler(0))
        if adapter == fourth:  # its time is over by now
            worker._paced_until = 0.0
        return golden(adapter)

    async def load(adapter: str, hurried: bool = False) -> list[int]:
        rests.clear()
        policies.clear()
        loaded = await (worker._load_missing(adapter) if hurried else worker.prepare(adapter))
        assert loaded is None or (isinstance(loaded, Prepared) and not loaded.error)
        await worker.encode_texts(adapter=adapter)
        return policies

    monkeypatch.setattr(worker.engine, "golden", noting)
    assert await load(first) == [os.SCHED_OTHER] and not rests, "nobody asks for anything"
    assert await load(second) == [os.SCHED_IDLE]
    assert len(rests) > 10, "each weight, its digest and each golden input is a part"
    assert await load(third, hurried=True) == [os.SCHED_OTHER] and not rests
    assert await load(fourth) == [os.SCHED_IDLE, os.SCHED_OTHER], "it has waited long enough"
    monkeypatch.setattr(module, "PACED_SECONDS", 0.0)
    assert await load(fifth) == [os.SCHED_OTHER] and not rests
    assert len(worker.engine.resident) == 5
