"""Work on requests of a CLIP begins in turns of the callers, and on no more than keeps the encoders busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from core.settings.serving import Serve
from serving.engines.preprocess import Preprocess
from serving.errors import DeadlineExceeded
from serving.http.clip_vectors import BATCHES_IN_WORK, ClipVectors, room_for
from serving.http.image_loader import ImageLoader, ImageSource, InspectedImage
from serving.messages import EncodeResult
from serving.releases.release_snapshot import ReleaseSnapshot
from tests.support.waiting import until
from tests.unit.serving.scripted_vlms import png

LIVE = ReleaseSnapshot(1, None, "i", "t")
SETTINGS = Serve(max_batch=4, caller_share=0.75, cache_bytes=0)


class Loader(ImageLoader):
    """Remembers whose images were opened."""

    def __init__(self) -> None:
        super().__init__(Preprocess(size=16), SETTINGS)
        self.opened: list[str] = []

    async def inspect(self, images: Sequence[ImageSource], caller: str = "") -> list[InspectedImage]:
        self.opened.append(caller)
        return await super().inspect(images, caller)


class Encoders:
    """Answer when ``go`` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def encode(self, kind: str, payload: Any, *_: object) -> EncodeResult:
        await self.go.wait()
        return EncodeResult(np.ones((len(payload), 4), np.float32), None, "i", "t")


async def test_images_of_a_flood_wait_unopened_and_others_go_ahead_of_them() -> None:
    """192 requests with 32 small pictures each were all opened and decoded at once, beside a model that needed both
    cores: the image of another caller took 1.5 s."""
    loader, encoders = Loader(), Encoders()
    vectors = ClipVectors(encoders, loader, None, SETTINGS)  # type: ignore[arg-type]
    pictures: list[ImageSource] = [("image", png(4, 4))] * 4

    def ask(caller: str, seconds: float = 60.0) -> asyncio.Task[Any]:
        return asyncio.create_task(vectors.of_images(pictures, LIVE, time.monotonic() + seconds, caller))

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
