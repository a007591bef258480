"""Batches of an encoder, of one model version each, taking turns. The engine is scripted."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from serving.messages import IMAGE_COST, EncodeRequest, EncodeResult, Modality
from serving.replicas import fair_batches
from serving.replicas.fair_batches import FairBatches
from tests.support.waiting import until

STABLE, CANARY = "clip-stable", "clip-canary"
MAX_TEXTS = 4


class Engine:
    """Records batches; each waits for ``go`` to be set, where a test closes it."""

    def __init__(self) -> None:
        self.batches: list[list[EncodeRequest]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.queue = FairBatches(self.run, MAX_TEXTS, wait_seconds=0.0, turn_seconds=60.0)
        self.queue.turns = dict.fromkeys(self.queue.turns, MAX_TEXTS)

    async def run(self, requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        self.batches.append(list(requests))
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        return [EncodeResult(np.full((len(r.payload), 1), 1, np.float32), r.adapter) for r in requests]

    def submit(
        self, adapter: str = STABLE, texts: int = 1, kind: Modality = "text", left: float = 60, caller: str = ""
    ) -> asyncio.Task[EncodeResult]:
        request = EncodeRequest(kind, ["x"] * texts, adapter, time.monotonic() + left, caller)
        return asyncio.create_task(self.queue.submit(request))

    async def busy(self) -> asyncio.Task[EncodeResult]:
        """Let a first batch run until ``go`` is set."""
        self.go.clear()
        first = self.submit("clip-first")
        await until(lambda: self.batches)
        return first

    async def behind_a_batch(self, *asked: dict[str, Any]) -> list[EncodeResult]:
        """Results of requests that arrive one after the other while another batch, which is not returned, runs."""
        first = await self.busy()
        tasks = []
        for options in asked:
            tasks.append(self.submit(**options))
            await asyncio.sleep(0)  # it has run to its first wait
        self.go.set()
        await first
        results = await asyncio.gather(*tasks)
        del self.batches[0]
        return results

    @property
    def adapters(self) -> list[set[str | None]]:
        return [{request.adapter for request in batch} for batch in self.batches]

    @property
    def callers(self) -> list[list[str]]:
        return [[request.caller for request in batch] for batch in self.batches]


@pytest.fixture
async def engine() -> Engine:
    return Engine()


async def test_two_releases_are_answered_each_by_its_own_adapter_in_batches_that_are_full(engine: Engine) -> None:
    results = await engine.behind_a_batch(*({"adapter": adapter} for adapter in (STABLE, CANARY) * MAX_TEXTS))
    assert [result.adapter for result in results] == [STABLE, CANARY] * MAX_TEXTS
    assert engine.adapters == [{STABLE}, {CANARY}]
    assert [len(batch) for batch in engine.batches] == [MAX_TEXTS, MAX_TEXTS]


async def test_a_flood_of_one_adapter_lets_another_wait_for_one_batch(engine: Engine) -> None:
    await engine.behind_a_batch(*[{}] * 100, {"adapter": CANARY})
    assert engine.adapters[:3] == [{STABLE}, {CANARY}, {STABLE}]


async def test_a_flood_of_one_caller_lets_another_wait_for_one_batch(engine: Engine) -> None:
    await engine.behind_a_batch(*[{"texts": MAX_TEXTS, "caller": "flood"}] * 100, *[{"caller": "good"}] * 2)
    assert engine.callers[:3] == [["flood"], ["good", "good"], ["flood"]]
    assert len(engine.batches) == 100 + 1


async def test_while_others_ask_batches_are_short_and_large_requests_are_encoded_in_parts(engine: Engine) -> None:
    """A batch of one caller's 16 images would take 140 ms, and another caller's image would wait for it."""
    engine.queue = FairBatches(engine.run, MAX_TEXTS, wait_seconds=0.0, turn_seconds=0.0)
    for _ in range(2):
        await engine.submit(STABLE, MAX_TEXTS, caller="flood")
    assert [len(batch[0].payload) for batch in engine.batches] == [MAX_TEXTS] * 2, "it asks alone"
    await engine.submit(STABLE, caller="good")
    engine.batches.clear()
    result = await engine.submit(STABLE, 3 * MAX_TEXTS, caller="flood")
    assert [len(part.payload) for batch in engine.batches for part in batch] == [1] * (3 * MAX_TEXTS)
    assert result.vectors is not None and len(result.vectors) == 3 * MAX_TEXTS


async def test_while_others_ask_batches_are_as_large_as_the_engine_is_fast(engine: Engine) -> None:
    engine.queue = FairBatches(engine.run, 4 * MAX_TEXTS, wait_seconds=0.0, turn_seconds=60.0)
    await asyncio.gather(*(engine.submit(STABLE, 32 * MAX_TEXTS, caller=caller) for caller in ("flood", "good")))
    assert [sum(part.cost for part in batch) for batch in engine.batches][:4] == [2, 4, 8, 16]


async def test_the_parts_of_a_request_are_joined_in_their_order_and_a_failure_ends_it(engine: Engine) -> None:
    async def run(requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        engine.batches.append(list(requests))
        broken = engine.failure is not None and requests[0].payload == [2]
        return [
            EncodeResult(None if broken else np.asarray([r.payload], np.float32).T, r.adapter, code="failed" * broken)
            for r in requests
        ]

    def submit(payload: list[int], caller: str) -> asyncio.Task[EncodeResult]:
        return asyncio.create_task(queue.submit(EncodeRequest("text", payload, STABLE, time.monotonic() + 60, caller)))

    queue = FairBatches(run, MAX_TEXTS, wait_seconds=0.0, turn_seconds=0.0)
    for caller in ("flood", "good", "flood"):
        await submit([9], caller)
    result = await submit([0, 1, 2, 3], "flood")
    assert result.vectors is not None and result.vectors.tolist() == [[0], [1], [2], [3]]
    engine.failure, engine.batches = RuntimeError(), []
    assert (await submit([0, 1, 2, 3], "flood")).code == "failed"
    assert (await submit([5], "flood")).code == ""
    assert [batch[0].payload for batch in engine.batches] == [[0], [1], [2], [5]]


async def test_every_image_has_its_vector_whatever_a_turn_amounts_to(engine: Engine) -> None:
    """A turn of 1.5 images: a batch holds two parts of one request."""
    engine.queue = FairBatches(engine.run, 16 * IMAGE_COST, wait_seconds=0.0, turn_seconds=0.0)
    await engine.submit(STABLE, caller="good")
    for turn in np.arange(1, 16 * IMAGE_COST, 0.7):
        engine.queue.turns["image"] = float(turn)
        sizes = {"flood": 7, "good": 8}
        results = await asyncio.gather(*(engine.submit(STABLE, n, "image", caller=who) for who, n in sizes.items()))
        assert [len(result.vectors) for result in results if result.vectors is not None] == [7, 8]


async def test_a_batch_is_filled_with_one_request_of_each_caller_in_turn(engine: Engine) -> None:
    await engine.behind_a_batch(*({"caller": caller} for caller in "aaaaaabbc"))
    assert ["".join(callers) for callers in engine.callers] == ["abca", "baaa", "a"]


async def test_a_request_that_did_not_fit_is_the_first_of_the_next_batch(engine: Engine) -> None:
    sizes = [("a", 1), ("b", MAX_TEXTS), ("c", 1), ("c", 2), ("c", 1)]
    await engine.behind_a_batch(*({"texts": texts, "caller": caller} for caller, texts in sizes))
    assert engine.callers == [["a", "c", "c"], ["b"], ["c"]]


async def test_requests_of_a_caller_run_in_the_order_of_their_arrival(engine: Engine) -> None:
    await engine.behind_a_batch(*({"texts": count} for count in (3, 2, 1)))
    assert [[len(request.payload) for request in batch] for batch in engine.batches] == [[3], [2, 1]]


async def test_images_and_texts_take_turns(engine: Engine) -> None:
    assert MAX_TEXTS // IMAGE_COST == 1
    await engine.behind_a_batch({}, *[{"kind": "image"}] * 2, {})
    assert [(batch[0].kind, len(batch)) for batch in engine.batches] == [("text", 2), ("image", 1), ("image", 1)]


async def test_a_request_that_is_larger_than_a_batch_runs_alone(engine: Engine) -> None:
    result = await engine.submit(STABLE, texts=3 * MAX_TEXTS)
    assert result.vectors is not None and len(result.vectors) == 3 * MAX_TEXTS


async def test_late_requests_are_dropped_without_compute(engine: Engine) -> None:
    results = await engine.behind_a_batch({"left": -1}, {"adapter": CANARY, "left": -1}, {})
    assert [result.code for result in results] == ["late", "late", ""]
    assert engine.adapters == [{STABLE}] and len(engine.batches[0]) == 1


async def test_a_client_that_goes_away_is_not_computed_for(engine: Engine) -> None:
    first = await engine.busy()
    gone, stays = engine.submit(STABLE, texts=2), engine.submit(STABLE)
    await asyncio.sleep(0)
    gone.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await gone
    engine.go.set()
    await asyncio.gather(first, stays)
    assert [len(request.payload) for request in engine.batches[1]] == [1]


async def test_a_batch_that_fails_fails_its_own_requests_only(engine: Engine) -> None:
    engine.failure = RuntimeError("device lost")
    with pytest.raises(RuntimeError, match="device lost"):
        await engine.submit(STABLE)
    engine.failure = None
    assert (await engine.submit(CANARY)).code == ""


async def test_after_a_batch_of_several_the_next_one_waits_to_fill(engine: Engine) -> None:
    engine.queue = FairBatches(engine.run, MAX_TEXTS, wait_seconds=60.0)
    first = await engine.busy()
    several = [engine.submit(STABLE) for _ in range(2)]
    await asyncio.sleep(0)
    engine.go.set()
    await asyncio.gather(first, *several)
    tasks = [engine.submit(STABLE) for _ in range(MAX_TEXTS - 1)]
    for _ in range(2):  # also the queue's task has had its turn
        await asyncio.sleep(0)
    assert len(engine.batches) == 2
    await asyncio.gather(*tasks, engine.submit(STABLE))  # full: no request waits any longer
    assert len(engine.batches) == 3


async def test_requests_one_at_a_time_do_not_wait(engine: Engine) -> None:
    engine.queue = FairBatches(engine.run, MAX_TEXTS, wait_seconds=60.0)
    for _ in range(3):
        await engine.submit(STABLE)


async def test_a_caller_whose_requests_wait_for_long_still_asks(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another caller's next batch is short, although the requests that it meets are old."""
    monkeypatch.setattr(fair_batches, "ASKS_SECONDS", 0.05)
    engine.queue = FairBatches(engine.run, MAX_TEXTS, wait_seconds=0.0, turn_seconds=0.0)
    first = await engine.busy()
    flood = [engine.submit(STABLE, MAX_TEXTS, caller="flood") for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    good = engine.submit(STABLE, caller="good")
    await asyncio.sleep(0)
    engine.go.set()
    await asyncio.gather(first, good, *flood)
    assert [part.caller for part in engine.batches[1]] == ["flood", "good"]
    assert [len(part.payload) for batch in engine.batches[1:] for part in batch] == [1] * 13
