from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from core.settings.serving import Serve
from serving.engines.preprocess import Preprocess
from serving.errors import DeadlineExceeded
from serving.http.clip_vectors import BATCHES_IN_WORK, ENTRY_BYTES, CachedVector, ClipVectors, VectorCache, room_for
from serving.http.errors import ApiError
from serving.http.image_loader import ImageLoader, ImageSource, InspectedImage
from serving.messages import EncodeResult, Modality
from serving.releases.types import ReleaseSnapshot
from tests.support.in_process_app import AppClient, open_in_process_app
from tests.support.inputs import pictures
from tests.support.waiting import until
from tests.unit.serving.auth_app import refusal
from tests.unit.serving.scripted_vlms import png, uri

RELEASE = ReleaseSnapshot(1, None, "i", "t")
SETTINGS = Serve(max_batch=4, caller_share=0.75, cache_bytes=0)
DIM = 8
LIVE = ReleaseSnapshot(1, None, "image-1", "text-1")
TEXT_CHANGED = ReleaseSnapshot(2, "clip-b", "image-1", "text-2")


class Loader(ImageLoader):
    """Records whose images were opened."""

    def __init__(self) -> None:
        super().__init__(Preprocess(size=16), SETTINGS)
        self.opened: list[str] = []

    async def inspect(self, images: Sequence[ImageSource], caller: str = "") -> list[InspectedImage]:
        self.opened.append(caller)
        return await super().inspect(images, caller)


class GatedEncoders:
    """Answer when ``go`` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def encode(self, kind: str, payload: Any, *_: object) -> EncodeResult:
        await self.go.wait()
        return EncodeResult(np.ones((len(payload), 4), np.float32), None, "i", "t")


async def test_images_of_a_flood_wait_unopened_and_others_go_ahead_of_them() -> None:
    """192 requests with 32 small pictures each used to be opened and decoded all at once, next to a model that needed
    both cores: the image of another caller took 1.5 s.
    """
    loader, encoders = Loader(), GatedEncoders()
    vectors = ClipVectors(encoders, loader, None, SETTINGS)  # type: ignore[arg-type]
    pictures: list[ImageSource] = [("image", png(4, 4))] * 4

    def ask(caller: str, seconds: float = 60.0) -> asyncio.Task[Any]:
        return asyncio.create_task(vectors.of_images(pictures, RELEASE, time.monotonic() + seconds, caller))

    flood = [ask("flood") for _ in range(40)]
    await until(lambda: len(loader.opened) == int(BATCHES_IN_WORK * 3 / 4))  # each request is a batch
    good = ask("good")
    await until(lambda: "good" in loader.opened)
    assert loader.opened.count("flood") == int(BATCHES_IN_WORK * 3 / 4)
    with pytest.raises(DeadlineExceeded, match="turn"):
        await ask("flood", 0.05)
    encoders.go.set()
    assert [len(found.rows) for found in await asyncio.gather(good, *flood)] == [4] * 41
    assert loader.opened.count("flood") == 40


def test_several_ingress_processes_share_what_keeps_the_encoders_busy() -> None:
    alone, one_of_two = room_for(SETTINGS), room_for(SETTINGS.model_copy(update={"ingress_replicas": 2}))
    assert alone.size == 2 * one_of_two.size
    assert room_for(SETTINGS.model_copy(update={"encoder_max_replicas": 3})).size == 3 * alone.size


class Tokens:
    """One token for each character, and start and end."""

    def rows(self, texts: list[str]) -> list[list[int]]:
        return [[1, *map(ord, text), 2] for text in texts]

    def cuts(self, text: str, row: list[int]) -> bool:
        return False


class Encoders:
    """A vector encodes the adapter and the input."""

    def __init__(self) -> None:
        self.spaces = {None: ("image-1", "text-1"), "clip-b": ("image-1", "text-2")}
        self.encoded: Counter[str] = Counter()

    async def encode(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str = ""
    ) -> EncodeResult:
        self.encoded[kind] += len(payload)
        vectors = np.zeros((len(payload), DIM), np.float32)
        vectors[:, 0] = snapshot.release
        vectors[:, 1] = [float(np.sum(item)) for item in payload]
        return EncodeResult(vectors, snapshot.clip, *self.spaces[snapshot.clip], 7.0, sum(map(len, payload)))


def clip_vectors() -> tuple[ClipVectors, Encoders]:
    encoders, tokens = Encoders(), Tokens()
    return ClipVectors(encoders, ImageLoader(Preprocess(size=16), Serve()), tokens, Serve()), encoders  # type: ignore[arg-type]


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
    import tracemalloc

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
    vectors, encoders = clip_vectors()
    picture = [("image", png(20, 20))]
    for _ in range(2):
        for snapshot in (LIVE, TEXT_CHANGED):
            texts = await vectors.of_texts(["cat", "a dog", "cat"], snapshot, 0.0, "")
            images = await vectors.of_images(picture, snapshot, 0.0, "")
            assert (texts.tokens, texts.logit_scale) == (5 + 7 + 5, 7.0)
            assert texts.rows[:, 0].tolist() == [snapshot.release] * 3
            assert (texts.rows[0] == texts.rows[2]).all() and (texts.rows[0] != texts.rows[1]).any()
            assert images.rows[0, 0] == 1  # of both: the image tower is the same
    assert encoders.encoded == {"text": 4, "image": 1}


async def test_an_image_that_is_cached_is_checked_all_the_same() -> None:
    vectors, encoders = clip_vectors()
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
