"""Images from outside to pixels: data URIs, uploads and URLs, decoded within bounds in a thread pool. Headers of all
images of a request are inspected before any is decoded."""

from __future__ import annotations

import asyncio
import binascii
import hashlib
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pybase64
from PIL import Image

from core.errors import RecordError
from core.settings.serving import Serve
from core.tracing import span
from ratchet_client.images import OpenedImage, open_accepted, open_image
from serving.engines.preprocess import Preprocess
from serving.http.errors import field_error, from_record
from serving.http.fair_room import SMALL_THREADS, DecodeQueue
from serving.messages import IMAGES_PER_REQUEST
from streams.records.fetching import ByteBudget, Fetcher, Rules

Result = TypeVar("Result")
ImageSource = tuple[str, str | bytes]
"""An image's place in the request; and a data URI, a URL, or its encoded bytes."""
JPEG_SCAN = b"\xff\xda"
USUAL_SCANS = 10
JOB_PIXELS = 2_000_000
"""Of several images that are decoded in one turn of their caller."""
JOBS_A_THREAD = 2
FETCH_SECONDS = 5.0
"""For one image, redirects included; its request has ``serve.deadline_seconds``."""
FETCHES = 16
"""Images that one process fetches at once; more wait."""
REQUEST_IMAGES = 2
"""Limit of a request's pixels, in images of ``serve.max_pixels``."""
LONGEST_SIDE = 2048
"""In pixels, as much as the largest VLMs use; larger pictures are scaled down before they are sent to a replica."""


@dataclass(frozen=True, slots=True, eq=False)
class InspectedImage:
    """An image whose header was read and is within bounds; not decoded yet."""

    place: str
    digest: bytes
    """SHA-256 of the encoded bytes."""
    pixels: int
    """The cost of decoding; see :func:`decoding_pixels`."""
    opened: OpenedImage


class ImageLoader:
    """Turns encoded images into RGB uint8 arrays, in threads, because Pillow decodes outside of the GIL. ``fetcher``
    replaces the one that ``bounds`` describe."""

    def __init__(self, preprocess: Preprocess, bounds: Serve, fetcher: Fetcher | None = None) -> None:
        self.preprocess = preprocess
        self.bounds = bounds
        self.queue = DecodeQueue(bounds.decode_pixels, bounds.caller_share)
        self._fetcher = fetcher or fetcher_of(bounds)

    async def pixels(self, images: Sequence[ImageSource], caller: str = "") -> npt.NDArray[np.uint8]:
        """Pixels for a CLIP, [n, S, S, 3], in order: :meth:`inspect` and :meth:`decoded`."""
        async with self.decoded(await self.inspect(images, caller), caller) as pixels:
            return pixels

    async def inspect(self, images: Sequence[ImageSource], caller: str = "") -> list[InspectedImage]:
        """Fetch URLs, and check images by their headers. Raises ApiError with the place of the first refused image."""
        param = images[0][0].split(".")[0] if images else ""
        if len(images) > IMAGES_PER_REQUEST:
            problem = f"{len(images)} images are more than {IMAGES_PER_REQUEST}."
            raise field_error(param, problem, "too_many_images")
        with span("inspect", images=len(images)):
            fetched = await self.fetched(images)
            inspected = await self.queue.run(caller, 0, lambda: [self._inspected(*image) for image in fetched])
        total = sum(image.pixels for image in inspected)
        if total > (most := REQUEST_IMAGES * self.bounds.max_pixels):
            problem = (
                f"the images have {total} pixels together, more than {most} ({REQUEST_IMAGES} x serve.max_pixels)."
            )
            raise field_error(param, problem, "too_many_pixels", 413)
        return inspected

    @asynccontextmanager
    async def decoded(self, images: Sequence[InspectedImage], caller: str = "") -> AsyncIterator[npt.NDArray[np.uint8]]:
        """Pixels for a CLIP, [n, S, S, 3], in order, reserved until the block ends. Raises ApiError."""
        scaled = len(images) * self.preprocess.size**2
        async with self._reserved(images, caller, scaled) as keep:
            pixels = np.stack(await self._decoded(images, self.preprocess.pixels, caller))
            keep(scaled)
            yield pixels

    @asynccontextmanager
    async def pictures(
        self, images: Sequence[ImageSource], caller: str = ""
    ) -> AsyncIterator[tuple[npt.NDArray[np.uint8], ...]]:
        """Pixels for a VLM, each [H, W, 3] in its own size: at most :data:`LONGEST_SIDE` a side and ``max_pixels``
        together; reserved until the block ends. Raises ApiError with the place of the first refused image."""
        if not images:  # without pictures there is no need to wait for room
            yield ()
            return
        share = self.bounds.max_pixels // len(images)
        inspected = await self.inspect(images, caller)
        async with self._reserved(inspected, caller) as keep:
            made = await self._decoded(inspected, lambda opened: fitted(opened.decode(), share), caller)
            keep(sum(picture.shape[0] * picture.shape[1] for picture in made))
            yield tuple(made)

    async def thumbnail(self, data: bytes, size: int, caller: str = "") -> bytes:
        """A PNG of a stored image, with at most ``size`` pixels on its longest side. Raises ApiError."""
        inspected = [await self.queue.run(caller, 0, partial(_inspected, "image", data, open_accepted))]
        async with self._reserved(inspected, caller):
            (png,) = await self._decoded(inspected, partial(_png, size), caller)
        return png

    def _reserved(
        self, images: Sequence[InspectedImage], caller: str, scaled: int = 0
    ) -> AbstractAsyncContextManager[Callable[[int], None]]:
        """``scaled``: pixels after scaling, which may be more."""
        return self.queue.reserved(caller, max(scaled, sum(image.pixels for image in images)))

    async def _decoded(
        self, images: Sequence[InspectedImage], decode: Callable[[OpenedImage], Result], caller: str
    ) -> list[Result]:
        with span("decode", images=len(images)):
            jobs = [
                self.queue.run(caller, sum(image.pixels for image in job), partial(_decode, job, decode))
                for job in jobs_of(images)
            ]
            return [result for results in await gathered(jobs) for result in results]

    async def fetched(self, images: Sequence[ImageSource]) -> list[ImageSource]:
        """The same images, with the bytes of those that are URLs. Raises ApiError with the place of the first one that
        cannot be fetched."""
        budget = ByteBudget(self.bounds.max_body_bytes)  # same limit as for images in the body
        return await gathered(self._one_fetched(place, image, budget) for place, image in images)

    async def _one_fetched(self, place: str, image: str | bytes, budget: ByteBudget) -> ImageSource:
        if not isinstance(image, str) or not image[:8].lower().startswith(("http:", "https:")):
            return place, image
        if self._fetcher is None:
            fix = "Send it as a data URI or multipart, or ask an operator to list its host in `serve.image_hosts`."
            raise field_error(place, f"images are not fetched here. {fix}", "image_url_off")
        try:
            return place, await self._fetcher.fetch(image, budget)
        except RecordError as error:
            raise from_record(error, place) from None

    def _inspected(self, place: str, image: str | bytes) -> InspectedImage:
        data = from_data_uri(image, place, self.bounds.max_image_bytes) if isinstance(image, str) else image
        within = partial(open_image, max_pixels=self.bounds.max_pixels, max_bytes=self.bounds.max_image_bytes)
        return _inspected(place, data, within)


def _inspected(place: str, data: bytes, read_header: Callable[[bytes], OpenedImage]) -> InspectedImage:
    try:
        opened = read_header(data)
    except RecordError as error:
        raise from_record(error, place) from None
    return InspectedImage(place, hashlib.sha256(data).digest(), decoding_pixels(opened, data), opened)


def jobs_of(images: Sequence[InspectedImage]) -> list[list[InspectedImage]]:
    """Split images, in order, into jobs: enough for all threads, and each short enough for one turn. Fewer jobs are
    better, because the end of each wakes the event loop, which takes the GIL from the threads."""
    most = math.ceil(len(images) / (JOBS_A_THREAD * SMALL_THREADS))
    jobs: list[list[InspectedImage]] = []
    for image in images:
        if jobs and len(jobs[-1]) < most and sum(each.pixels for each in jobs[-1]) + image.pixels <= JOB_PIXELS:
            jobs[-1].append(image)
        else:
            jobs.append([image])
    return jobs


def _decode(images: Sequence[InspectedImage], decode: Callable[[OpenedImage], Result]) -> list[Result]:
    results = []
    for image in images:
        try:
            results.append(decode(image.opened))
        except RecordError as error:
            raise from_record(error, image.place) from None
    return results


def decoding_pixels(opened: OpenedImage, data: bytes) -> int:
    """Width times height, once for every ten scans of a progressive JPEG: each scan goes over the whole image. Encoders
    write about ten, and a scan may have a few bytes."""
    width, height = opened.size
    scans = data.count(JPEG_SCAN) if opened.kind == "JPEG" else 0
    return width * height * max(1, scans // USUAL_SCANS)


def _png(size: int, opened: OpenedImage) -> bytes:
    image = opened.decode()
    image.thumbnail((size, size))
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def fetcher_of(bounds: Serve, seconds: float = FETCH_SECONDS) -> Fetcher | None:
    """The fetcher of images by URL; None if no host is listed."""
    if not bounds.image_hosts:
        return None
    return Fetcher(Rules(bounds.image_hosts, bounds.image_networks, bounds.max_image_bytes, seconds, FETCHES))


def fitted(image: Image.Image, max_pixels: int) -> npt.NDArray[np.uint8]:
    """An RGB image as [H, W, 3], scaled down if a side or its area is too large."""
    width, height = image.size
    scale = min(LONGEST_SIDE / max(width, height), math.sqrt(max_pixels / (width * height)))
    if scale < 1:
        size = (max(1, int(width * scale)), max(1, int(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(image, np.uint8)


def from_data_uri(uri: str, place: str, max_bytes: int) -> bytes:
    """Bytes of ``data:image/...;base64,...``. Raises ApiError if not base64, or too large (checked before decoding)."""
    head, comma, payload = uri.partition(",")
    if not comma or not head.lower().startswith("data:") or not head.lower().endswith(";base64"):
        raise field_error(place, "expected a data URI like data:image/png;base64,iVBORw0... or a URL.", "image_format")
    if len(payload) > max_bytes * 4 // 3 + 4:
        raise field_error(place, f"the image is larger than {max_bytes} bytes.", "image_too_large", 413)
    try:
        return pybase64.b64decode(payload, validate=True)  # ten times as fast as the standard library's
    except (binascii.Error, ValueError):
        raise field_error(place, "the data URI is not valid base64.", "image_format") from None


async def gathered(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """All results; the first failure, or a cancellation, ends the rest."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
