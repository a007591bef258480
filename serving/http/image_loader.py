"""Images from outside to pixels: data URIs, uploads and URLs, decoded within bounds in a pool of threads."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import Image

from ops.errors import RecordError
from ops.settings import Serve
from serving.engines.preprocess import Preprocess
from serving.http.errors import ApiError, from_record
from streams.fetching import ByteBudget, Fetcher, Rules
from streams.images import decode_image

THREADS = 2
LONGEST_SIDE = 2048
"""Pixels: what the largest VLMs look at. A larger picture is scaled down before it travels to a replica."""


class ImageLoader:
    """Turns encoded images into RGB uint8 arrays. Threads, because Pillow decodes outside of the GIL.

    Args:
        preprocess: what the CLIP wants.
        bounds: sizes, and whether and from where images are fetched.
        fetcher: for tests, in place of the one that ``bounds`` describe.
    """

    def __init__(self, preprocess: Preprocess, bounds: Serve, fetcher: Fetcher | None = None) -> None:
        self.preprocess = preprocess
        self.bounds = bounds
        self._pool = ThreadPoolExecutor(THREADS, "image-loader")
        self._fetcher = fetcher or fetcher_of(bounds)

    async def pixels(self, images: Sequence[tuple[str, str | bytes]]) -> npt.NDArray[np.uint8]:
        """What a CLIP looks at, [n, S, S, 3]: decoded (place in the request, data URI or bytes) pairs, in order.

        Raises:
            ApiError: names the place of the first image that is refused, and why.
        """
        return np.stack(await self._all(images, self.preprocess.pixels))

    async def pictures(self, images: Sequence[tuple[str, str | bytes]]) -> tuple[npt.NDArray[np.uint8], ...]:
        """What a VLM looks at, each [H, W, 3] in its own size: at most :data:`LONGEST_SIDE` a side, and all of them
        together at most ``max_pixels``, so that a request stays bounded in memory.

        Raises:
            ApiError: names the place of the first image that is refused, and why.
        """
        share = self.bounds.max_pixels // max(1, len(images))
        return tuple(await self._all(images, lambda image: fitted(image, share)))

    async def _all(
        self, images: Sequence[tuple[str, str | bytes]], finish: Callable[[Image.Image], npt.NDArray[np.uint8]]
    ) -> list[npt.NDArray[np.uint8]]:
        if len(images) > self.bounds.max_images:
            param = images[0][0].split(".")[0]
            raise ApiError(
                400, f"{param}: {len(images)} images are more than {self.bounds.max_images} (serve.max_images).",
                param=param, code="too_many_images",
            )  # fmt: skip
        budget = ByteBudget(self.bounds.max_body_bytes)  # fetched images weigh what sent ones may
        tasks = [asyncio.create_task(self._one(place, image, finish, budget)) for place, image in images]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # one was refused, or nobody waits any more
                task.cancel()

    async def _one(
        self, place: str, image: str | bytes, finish: Callable[[Image.Image], npt.NDArray[np.uint8]], budget: ByteBudget
    ) -> npt.NDArray[np.uint8]:
        if isinstance(image, str) and image[:8].lower().startswith(("http:", "https:")):
            if self._fetcher is None:
                raise ApiError(
                    400, f"{place}: images are not fetched here. Send it as a data URI or multipart, or ask an "
                    "operator to list its host in `serve.image_hosts`.", param=place, code="image_url_off",
                )  # fmt: skip
            try:
                image = await self._fetcher.fetch(image, budget)
            except RecordError as error:
                raise from_record(error, place) from None
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._decoded, place, image, finish)

    def _decoded(
        self, place: str, image: str | bytes, finish: Callable[[Image.Image], npt.NDArray[np.uint8]]
    ) -> npt.NDArray[np.uint8]:
        data = from_data_uri(image, place, self.bounds.max_image_bytes) if isinstance(image, str) else image
        try:
            decoded = decode_image(data, max_pixels=self.bounds.max_pixels, max_bytes=self.bounds.max_image_bytes)
            return finish(decoded)
        except RecordError as error:
            raise from_record(error, place) from None


def fetcher_of(bounds: Serve) -> Fetcher | None:
    """What fetches images by URL; None where no host is listed."""
    if not bounds.image_hosts:
        return None
    return Fetcher(
        Rules(
            bounds.image_hosts, bounds.image_networks, bounds.max_image_bytes, bounds.image_seconds,
            bounds.image_fetches,
        )
    )  # fmt: skip


def fitted(image: Image.Image, max_pixels: int, longest: int = LONGEST_SIDE) -> npt.NDArray[np.uint8]:
    """An RGB image as [H, W, 3], scaled down where a side or its area is too large."""
    width, height = image.size
    scale = min(longest / max(width, height), math.sqrt(max_pixels / (width * height)))
    if scale < 1:
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(image, np.uint8)


def from_data_uri(uri: str, place: str, max_bytes: int) -> bytes:
    """Bytes of ``data:image/...;base64,...``.

    Raises:
        ApiError: no base64, or too large (checked before decoding).
    """
    head, comma, payload = uri.partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        raise ApiError(
            400,
            f"{place}: expected a data URI like data:image/png;base64,iVBORw0... or a URL.",
            param=place,
            code="image_format",
        )
    if len(payload) > max_bytes * 4 // 3 + 4:
        raise ApiError(
            413, f"{place}: the image is larger than {max_bytes} bytes.", param=place, code="image_too_large"
        )
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{place}: the data URI is not valid base64.", param=place, code="image_format") from None
