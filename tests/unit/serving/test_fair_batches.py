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


@pytest.fixture
async def engine() -> Engine:
    return Engine()


IMAGE = {"kind": "image"}
assert MAX_TEXTS // IMAGE_COST == 1


@pytest.mark.parametrize(
    ("asked", "shown", "batches"),
    [
        ([{"adapter": each} for each in (STABLE, CANARY) * 4], "adapter", [[STABLE] * 4, [CANARY] * 4]),
        ([{}] * 100 + [{"adapter": CANARY}], "adapter", [[STABLE] * 4, [CANARY], [STABLE] * 4]),
        ([{"texts": 4, "caller": "a"}] * 100 + [{"caller": "b"}] * 2, "caller", [["a"], ["b", "b"], ["a"]]),
        ([{"caller": caller} for caller in "aaaaaabbc"], "caller", [["a", "b", "c", "a"], ["b", "a", "a", "a"], ["a"]]),
        (
            [{"caller": caller, "texts": texts} for caller, texts in zip("abccc", (1, 4, 1, 2, 1), strict=True)],
            "caller",
            [["a", "c", "c"], ["b"], ["c"]],
        ),
        ([{"texts": count} for count in (3, 2, 1)], "size", [[3], [2, 1]]),
        ([{"texts": 12}, {}], "size", [[12], [1]]),
        ([{}, IMAGE, IMAGE, {}], "kind", [["text", "text"], ["image"], ["image"]]),
        ([{"left": -1}, {"adapter": CANARY, "left": -1}, {}], "adapter", [[STABLE]]),
    ],
    ids=[
        "two releases have full batches of their own", "a flood of one adapter lets another wait for one batch",
        "a flood of one caller lets another wait for one batch", "a batch takes one request of each caller in turn",
        "what did not fit is the first of the next batch", "a caller's requests keep their order",
        "what is larger than a batch runs alone", "images and texts take turns", "late ones are not computed",
    ],
)  # fmt: skip
async def test_requests_behind_a_batch_run_in_turns(
    engine: Engine, asked: list[dict[str, Any]], shown: str, batches: list[list[Any]]
) -> None:
    results = await engine.behind_a_batch(*asked)
    assert [result.code for result in results] == ["late" if "left" in each else "" for each in asked]
    assert [result.adapter for result in results] == [each.get("adapter", STABLE) for each in asked]
    made = [
        [len(request.payload) if shown == "size" else getattr(request, shown) for request in batch]
        for batch in engine.batches
    ]
    assert made[: len(batches)] == batches
    assert len(made) == len(batches) or len(asked) > 100


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


async def test_a_caller_whose_requests_wait_long_still_asks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
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
