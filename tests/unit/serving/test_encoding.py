"""Texts and images of many callers become vectors: ingress, cache and turns, then the batches of an encoder."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest

from core.settings.serving import Serve
from serving.engines.preprocess import Preprocess
from serving.errors import DeadlineExceeded
from serving.http.clip_vectors import BATCHES_IN_WORK, ENTRY_BYTES, CachedVector, ClipVectors, VectorCache, room_for
from serving.http.errors import ApiError
from serving.http.image_loader import ImageLoader, ImageSource
from serving.messages import IMAGE_COST, EncodeRequest, EncodeResult, Modality
from serving.releases.types import ReleaseSnapshot
from serving.replicas.fair_batches import FairBatches
from tests.support.in_process_app import AppClient, open_in_process_app
from tests.support.inputs import pictures
from tests.support.waiting import until
from tests.unit.serving.auth_app import refusal
from tests.unit.serving.scripted_vlms import Words, png, uri

DIM = 8
SETTINGS = Serve(max_batch=4, caller_share=0.75)
LIVE = ReleaseSnapshot(1, None, "image-1", "text-1")
TEXT_CHANGED = ReleaseSnapshot(2, "clip-b", "image-1", "text-2")


class Encoders:
    """A vector encodes the release and the input. They answer when ``go`` is set."""

    def __init__(self) -> None:
        self.encoded: Counter[str] = Counter()
        self.go = asyncio.Event()
        self.go.set()

    async def encode(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str = ""
    ) -> EncodeResult:
        await self.go.wait()
        self.encoded[kind] += len(payload)
        vectors = np.zeros((len(payload), DIM), np.float32)
        vectors[:, 0] = snapshot.release
        vectors[:, 1] = [float(np.sum(item)) for item in payload]
        return EncodeResult(vectors, snapshot.clip, snapshot.image_space, snapshot.text_space, 7.0)


def clip_vectors(settings: Serve = SETTINGS) -> tuple[ClipVectors, Encoders, Any]:
    encoders, loader = Encoders(), ImageLoader(Preprocess(size=16), settings)
    return ClipVectors(encoders, loader, Words(), settings), encoders, loader  # type: ignore[arg-type]


async def test_images_of_a_flood_wait_unopened_and_others_go_ahead_of_them() -> None:
    """192 requests with 32 small pictures each used to be opened and decoded all at once, next to a model that needed
    both cores: the image of another caller took 1.5 s.
    """
    vectors, encoders, loader = clip_vectors(SETTINGS.model_copy(update={"cache_bytes": 0}))
    encoders.go.clear()
    inspect = loader.inspect = AsyncMock(wraps=loader.inspect)
    pictures: list[ImageSource] = [("image", png(4, 4))] * 4

    def ask(caller: str, seconds: float = 60.0) -> asyncio.Task[Any]:
        return asyncio.create_task(vectors.of_images(pictures, LIVE, time.monotonic() + seconds, caller))

    def opened(caller: str) -> int:
        return sum(call.args[1] == caller for call in inspect.await_args_list)

    flood = [ask("flood") for _ in range(40)]
    await until(lambda: opened("flood") == int(BATCHES_IN_WORK * 3 / 4))  # each request is a batch
    good = ask("good")
    await until(lambda: opened("good"))
    assert opened("flood") == int(BATCHES_IN_WORK * 3 / 4)
    with pytest.raises(DeadlineExceeded, match="turn"):
        await ask("flood", 0.05)
    encoders.go.set()
    assert [len(found.rows) for found in await asyncio.gather(good, *flood)] == [4] * 41
    assert opened("flood") == 40
    alone, one_of_two = room_for(SETTINGS), room_for(SETTINGS.model_copy(update={"ingress_replicas": 2}))
    assert alone.size == 2 * one_of_two.size, "ingress processes share what keeps the encoders busy"
    assert room_for(SETTINGS.model_copy(update={"encoder_max_replicas": 3})).size == 3 * alone.size


def entry(number: float = 0.0) -> CachedVector:
    return CachedVector(np.full(DIM, number, np.float32), 1.0, 0)


def test_what_was_not_asked_for_the_longest_makes_room() -> None:
    cache = VectorCache(3 * (ENTRY_BYTES + DIM * 4))
    for name in (b"a", b"b", b"c"):
        cache.put(("text", "space", name), entry())
    assert cache.get(("text", "space", b"a")) is not None
    cache.put(("text", "space", b"d"), entry())
    assert [name for name in (b"a", b"b", b"c", b"d") if cache.get(("text", "space", name)) is None] == [b"b"]
    assert (len(cache), cache.bytes) == (3, 3 * (ENTRY_BYTES + DIM * 4))


def test_the_bound_covers_what_an_entry_really_takes() -> None:
    cache = VectorCache(1 << 30)
    tracemalloc.start()
    try:
        for number in range(2000):
            cache.put(("image", "0123456789ab", number.to_bytes(32, "big")), entry(number))
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < cache.bytes


async def test_a_release_is_answered_by_vectors_of_its_own_spaces_only() -> None:
    vectors, encoders, _ = clip_vectors()
    picture = [("image", png(20, 20))]
    for _ in range(2):
        for snapshot in (LIVE, TEXT_CHANGED):
            texts = await vectors.of_texts(["cat", "a dog", "cat"], snapshot, 0.0, "")
            images = await vectors.of_images(picture, snapshot, 0.0, "")
            assert (texts.tokens, texts.logit_scale) == (1 + 2 + 1, 7.0)
            assert texts.rows[:, 0].tolist() == [snapshot.release] * 3
            assert (texts.rows[0] == texts.rows[2]).all() and (texts.rows[0] != texts.rows[1]).any()
            assert images.rows[0, 0] == 1  # of both: the image tower is the same
    assert encoders.encoded == {"text": 4, "image": 1}


async def test_an_image_that_is_cached_is_checked_all_the_same() -> None:
    vectors, encoders, _ = clip_vectors()
    await vectors.of_images([("images.0", png(20, 20))], LIVE, 0.0, "")
    with pytest.raises(ApiError, match=r"images\.1"):
        await vectors.of_images([("images.0", png(20, 20)), ("images.1", b"text")], LIVE, 0.0, "")
    both = await vectors.of_images([("images.0", png(21, 20)), ("images.1", png(20, 20))], LIVE, 0.0, "")
    assert encoders.encoded == {"image": 2}
    assert both.tokens == 0


LONG = "the invoice of march lists the following goods: " * 40
LONG_LABEL = "1 " * 100
CUT = "x-ratchet-truncated"
CALLS: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/embeddings", {"input": ["a cat", LONG, {"image": uri(pictures(1)[0])}, "a dog", LONG + "PAID"]}, "input.1"),
    ("/v1/classify", {"images": [uri(pictures(1)[0])], "labels": ["cat", LONG_LABEL]}, "labels.1"),
    ("/v1/search", {"text": LONG}, "text"),
]


@pytest.fixture(scope="module", params=[Serve().cache_bytes, 0], ids=["cached", "not cached"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppClient]:
    with asyncio.Runner() as runner:
        settings = Serve(cache_bytes=request.param)
        _, app = runner.run(open_in_process_app(tmp_path_factory.mktemp("app"), settings))
        yield AppClient(runner, app)


@pytest.mark.parametrize(("path", "body", "place"), CALLS)
def test_a_long_text_is_cut_and_the_answer_says_so_or_is_refused_and_named(
    client: AppClient, path: str, body: dict[str, Any], place: str
) -> None:
    for asked in (body, {**body, "truncate": True}, body):  # the last one is answered from the cache
        answer = client.post(path, json=asked)
        assert answer.status_code == 200, answer.text
        assert answer.headers[CUT] == ("2" if place == "input.1" else "1")
    answer = client.post(path, json={**body, "truncate": False})
    assert place in refusal(answer, 400, "text_too_long")
    assert answer.json()["error"]["param"] == place
    assert CUT not in answer.headers


def test_embeddings_name_the_places_of_long_texts_and_count_what_was_read(client: AppClient) -> None:
    _, body, _ = CALLS[0]
    answer = client.post("/v1/embeddings", json=body).json()
    assert answer["usage"]["truncated"] == [1, 4]
    single = [client.post("/v1/embeddings", json={"input": text}).json() for text in ("a cat", LONG, "a dog")]
    cat, long, dog = (each["usage"]["prompt_tokens"] for each in single)
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == cat + 2 * long + dog
    alone = pytest.approx(single[1]["data"][0]["embedding"], abs=1e-5)
    assert answer["data"][1]["embedding"] == alone and answer["data"][4]["embedding"] == alone
    for truncate in (True, False):
        for path, body in (("/v1/embeddings", {"input": ["a cat", "a dog"]}), ("/v1/search", {"text": "a cat"})):
            short = client.post(path, json={**body, "truncate": truncate})
            assert (short.status_code, CUT in short.headers) == (200, False)
            assert "truncated" not in short.json().get("usage", {})


STABLE, CANARY = "clip-stable", "clip-canary"
MAX_TEXTS = 4


class Engine:
    """Records batches; each waits for ``go`` to be set, where a test closes it."""

    def __init__(self) -> None:
        self.batches: list[list[EncodeRequest]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.failure: Exception | None = None
        self.queue = FairBatches(self.run, MAX_TEXTS, turn_seconds=60.0)
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


async def test_while_others_ask_large_requests_are_encoded_in_parts_and_a_failure_ends_them(engine: Engine) -> None:
    """A batch of one caller's 16 images would take 140 ms, and another caller's image would wait for it."""

    async def run(requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        engine.batches.append(list(requests))
        broken = engine.failure is not None and requests[0].payload == [2]
        return [
            EncodeResult(None if broken else np.asarray([r.payload], np.float32).T, r.adapter, code="failed" * broken)
            for r in requests
        ]

    async def submit(payload: list[int], caller: str = "flood") -> EncodeResult:
        return await queue.submit(EncodeRequest("text", payload, STABLE, time.monotonic() + 60, caller))

    def parts() -> list[list[int]]:
        return [list(batch[0].payload) for batch in engine.batches]

    queue = FairBatches(run, MAX_TEXTS, turn_seconds=0.0)
    await submit([0, 1, 2, 3])
    assert parts() == [[0, 1, 2, 3]], "it asks alone"
    await submit([9], "good")
    engine.batches = []
    result = await submit([0, 1, 2, 3])
    assert result.vectors is not None and result.vectors.tolist() == [[0], [1], [2], [3]]
    assert parts() == [[0], [1], [2], [3]]
    engine.failure, engine.batches = RuntimeError(), []
    assert [(await submit([0, 1, 2, 3])).code, (await submit([5])).code] == ["failed", ""]
    assert parts() == [[0], [1], [2], [5]]


async def test_every_image_has_its_vector_whatever_a_turn_amounts_to(engine: Engine) -> None:
    """A turn of 1.5 images: a batch holds two parts of one request."""
    engine.queue = FairBatches(engine.run, 16 * IMAGE_COST, turn_seconds=0.0)
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


async def test_beside_a_batch_only_a_whole_one_runs_and_beside_one_that_hangs_any(engine: Engine) -> None:
    engine.queue = FairBatches(engine.run, MAX_TEXTS, turn_seconds=math.inf, whole=1)
    first = await engine.busy()
    tasks = [engine.submit() for _ in range(MAX_TEXTS - 1)]
    for _ in range(5):  # the queue's task has had its turn
        await asyncio.sleep(0)
    assert len(engine.batches) == 1
    tasks += [engine.submit() for _ in range(MAX_TEXTS)]
    await until(lambda: len(engine.batches) == 2)
    for _ in range(5):
        await asyncio.sleep(0)
    assert len(engine.batches) == 2, "two at most, also of whole ones"
    engine.go.set()
    await asyncio.gather(first, *tasks)
    assert [len(batch) for batch in engine.batches] == [1, MAX_TEXTS, MAX_TEXTS - 1]
    engine.batches = []
    engine.queue = FairBatches(engine.run, MAX_TEXTS, patience=0.01)
    hangs = await engine.busy()
    other = engine.submit()
    await until(lambda: len(engine.batches) == 2)
    engine.go.set()
    await asyncio.gather(hangs, other)
