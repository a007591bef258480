"""Images of requests: inspected, fetched from URLs, decoded by turns of the callers within bounds."""

from __future__ import annotations

import asyncio
import io
import json
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import AsyncMock

import httpx
import numpy as np
import pytest
from PIL import Image

from core.settings.serving import Serve
from ratchet_client.images import OpenedImage, open_image
from serving.engines.preprocess import Preprocess
from serving.http.app_state import AppState
from serving.http.errors import ApiError
from serving.http.fair_room import SMALL_PIXELS, SMALL_THREADS, DecodeQueue, FairRoom
from serving.http.image_loader import ImageLoader, ImageSource, decoding_pixels, fetcher_of
from serving.messages import IMAGES_PER_REQUEST
from tests.support.waiting import until
from tests.support.web_server import WebServer, redirect, reply, web_server
from tests.unit.serving.scripted_vlms import (
    SETTINGS,
    RawRequest,
    ScriptedVlms,
    about_image,
    app_of,
    app_state,
    client,
    png,
    uri,
)

CHAT = "/v1/chat/completions"
RED, SQUARE = png(), png(100, 100)
LARGE = SMALL_PIXELS + 1


def loader(**bounds: Any) -> ImageLoader:
    return ImageLoader(Preprocess(size=16), Serve(**bounds))


def jpeg(progressive: bool = False) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", progressive=progressive)
    return buffer.getvalue()


async def pictures(images: ImageLoader, sources: Sequence[ImageSource]) -> tuple[np.ndarray, ...]:
    async with images.pictures(sources) as made:
        return made


@pytest.mark.parametrize(
    ("images", "status", "code", "told"),
    [
        ([SQUARE] * 3, 413, "too_many_pixels", r"^413: images: .* 30000 pixels .* 20000 \(2 x serve.max_pixels\)"),
        ([b""] * (IMAGES_PER_REQUEST + 1), 400, "too_many_images", "^400: images: 33 images are more than 32"),
        ([SQUARE, b""], 400, "image_missing", "images.1: "), ([SQUARE, b"text"], 400, "image_format", "images.1: "),
        ([SQUARE, png(10_001, 1)], 413, "image_too_many_pixels", "images.1: "),
    ],
)  # fmt: skip
async def test_nothing_is_decoded_of_a_request_that_the_headers_of_its_images_refuse(
    images: list[bytes], status: int, code: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bounded = loader(max_pixels=10_000)
    assert (await bounded.pixels([("images.0", SQUARE), ("images.1", SQUARE)])).shape == (2, 16, 16, 3)
    monkeypatch.setattr(OpenedImage, "decode", None)
    sources = [(f"images.{number}", data) for number, data in enumerate(images)]
    for load in (bounded.pixels, lambda sources: pictures(bounded, sources)):
        with pytest.raises(ApiError, match=told) as caught:
            await load(sources)
        assert (caught.value.status_code, caught.value.code) == (status, code)
        assert caught.value.param == ("images" if told.startswith("^") else "images.1")


def test_a_progressive_jpeg_counts_once_for_every_ten_scans() -> None:
    whole = jpeg(progressive=True)
    last = whole.rindex(b"\xff\xda")
    many = whole[:last] + whole[last:-2] * 50
    assert [decoding_pixels(open_image(data), data) for data in (jpeg(), whole, many)] == [600, 600, 600 * 5]


async def test_a_sample_that_ingest_accepted_has_a_png_as_its_thumbnail_however_large_it_is() -> None:
    data = await loader(max_image_bytes=1024, max_pixels=100).thumbnail(jpeg(), 20)
    assert len(jpeg()) > 1024
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == ("PNG", (20, 13))


async def test_data_uris_and_uploads_are_the_same_pixels_in_their_order() -> None:
    red, blue = png(5, 3, (255, 0, 0)), png(2, 7, (0, 0, 255))
    made = await pictures(loader(), [("a", uri(red)), ("b", blue), ("c", red), ("d", png(4096, 64))])
    assert [image.shape for image in made] == [(3, 5, 3), (7, 2, 3), (3, 5, 3), (32, 2048, 3)]
    assert (made[0] == made[2]).all()
    assert (made[1] == np.array([0, 0, 255], np.uint8)).all()


async def test_images_count_as_large_as_they_are_kept_until_they_are_let_go() -> None:
    images = loader(max_pixels=1_000_000)
    async with images.pictures([(f"messages.0.content.{n}", png(1000, 1000)) for n in range(2)], "a") as made:
        kept = sum(picture.shape[0] * picture.shape[1] for picture in made)
        assert images.queue.pixels == kept <= 1_000_000
    assert images.queue.pixels == 0
    async with images.decoded(await images.inspect([("a", png()), ("b", png())]), "a") as pixels:
        assert pixels.shape == (2, 16, 16, 3)
        assert images.queue.pixels == 2 * 16 * 16, "as large as a CLIP looks at them"
    assert images.queue.pixels == 0


async def entered(room: FairRoom, caller: str, amount: int) -> asyncio.Task[int]:
    task = asyncio.create_task(room.enter(caller, amount))
    await asyncio.sleep(0)
    return task


async def test_what_a_request_took_is_given_back_and_all_get_in_by_turns() -> None:
    room, inside, values, order = FairRoom(100, 0.6), 0, random.Random(0), []

    async def one(caller: str, amount: int) -> None:
        nonlocal inside
        counted = await room.enter(caller, amount)
        inside += counted
        order.append(caller)
        assert counted <= 60 and inside < 100 + 60
        try:
            for _ in range(values.randrange(4)):
                await asyncio.sleep(0)
        finally:
            inside -= counted
            room.leave(caller, counted)

    tasks = [asyncio.create_task(one(f"caller {n % 5}", values.randint(1, 90))) for n in range(300)]
    while not all(task.done() for task in tasks):
        await asyncio.sleep(0)
        values.choice(tasks).cancel()  # while it waits, is admitted or is inside
    assert inside == 0 and len(order) > 100
    assert len(set(order[:5])) == 5
    assert all([(await entered(room, f"later {n}", 10)).done() for n in range(10)])


class Gate:
    """Work that waits until it is admitted, and records its order."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun = 0
        self.order: list[str] = []

    def work(self, name: str) -> Callable[[], str]:
        def run() -> str:
            self.begun += 1
            assert self.open.wait(30)
            self.order.append(name)
            return name

        return run


async def test_one_large_image_is_decoded_at_once_by_turns_of_callers_and_small_ones_do_not_wait_for_it() -> None:
    queue, gate = DecodeQueue(10**9, 1.0), Gate()
    bombs = [asyncio.create_task(queue.run("a", LARGE, gate.work(f"a{n}"))) for n in range(10)]
    await asyncio.sleep(0)
    good = asyncio.create_task(queue.run("b", LARGE, gate.work("b")))
    await until(lambda: gate.begun)
    assert await queue.run("a", SMALL_PIXELS, lambda: "small") == "small"
    assert gate.begun == 1
    gate.open.set()
    assert await good == "b"
    await asyncio.gather(*bombs)
    assert gate.order[:3] == ["a0", "a1", "b"]


async def test_what_waits_is_dropped_when_no_one_waits_for_it_and_a_failure_ends_nothing_else() -> None:
    queue, gate = DecodeQueue(10**9, 1.0), Gate()
    tasks = [asyncio.create_task(queue.run("a", 1, gate.work(str(n)))) for n in range(SMALL_THREADS + 3)]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    gate.open.set()
    with pytest.raises(ZeroDivisionError):
        await queue.run("a", 1, lambda: 1 // 0)
    assert await queue.run("a", 1, lambda: "next") == "next"
    assert len(gate.order) <= SMALL_THREADS  # those that ran already


async def test_pixels_that_wait_are_bounded_for_all_and_for_one_and_only_pictures_wait() -> None:
    images = loader(max_pixels=250, caller_share=0.5)
    async with asyncio.TaskGroup() as tasks:
        done = asyncio.Event()
        for caller, pixels in (("a", 10_000), ("b", 300)):  # one that is alone is always taken
            tasks.create_task(_hold(images.queue, caller, pixels, done))
        await asyncio.sleep(0)
        for caller, pixels, whose in (("a", 1, "your images"), ("c", 201, "images")):
            with pytest.raises(ApiError, match=f"^429: {whose} that wait.*serve.max_pixels"):
                await _hold(images.queue, caller, pixels, done)
        async with asyncio.timeout(5), images.pictures((), "a") as made:
            assert made == (), "a question without pictures does not wait for those with some"
        done.set()
    assert images.queue.pixels == 0


async def _hold(queue: DecodeQueue, caller: str, pixels: int, done: asyncio.Event) -> None:
    async with queue.reserved(caller, pixels):
        await done.wait()


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as made:
        made.pages |= {"/red.png": reply(RED), "/drip": made.endless(b"x", 0.01)}
        yield made


def serving(web: WebServer, seconds: float = 60, **more: Any) -> tuple[AppState, ScriptedVlms]:
    fetching = {"image_hosts": [f"cdn.test:{web.port}"], "image_networks": ["127.0.0.1/32"], "max_image_bytes": 32_768}
    settings = Serve(**{**SETTINGS.model_dump(), **fetching, **more})
    vlms = ScriptedVlms()
    fetcher = fetcher_of(settings, seconds)
    assert fetcher is not None
    fetcher.resolve = AsyncMock(return_value=["127.0.0.1"])
    return replace(app_state(vlms, settings), image_loader=ImageLoader(Preprocess(size=16), settings, fetcher)), vlms


async def chat(at: AppState, address: str) -> httpx.Response:
    async with client(at) as http:
        return await http.post(CHAT, json={"messages": about_image(image=address)})


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def address(web: WebServer, path: str = "/red.png") -> str:
    return f"http://cdn.test:{web.port}{path}"


async def test_a_url_and_a_data_uri_of_one_image_are_the_same_to_the_model(web: WebServer) -> None:
    at, vlms = serving(web)
    answers = [await chat(at, image) for image in (uri(), address(web))]
    async with client(at) as http:
        answers.append(await http.post("/v1/vqa", json={"image": address(web), "question": "what is it?"}))
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    sent, *fetched = [ask.images[0] for ask, _ in vlms.asked]
    assert all((picture == sent).all() for picture in fetched)


async def test_nothing_is_fetched_unless_a_host_is_listed(web: WebServer) -> None:
    for url in (address(web), "HTTP://169.254.169.254/latest", "https://example.org/a.png"):
        assert code_of(await chat(app_state(ScriptedVlms()), url)) == (400, "image_url_off")
    assert web.asked == []


async def test_each_refusal_has_its_code_and_its_place(web: WebServer) -> None:
    web.pages |= {
        "/moved": redirect("file:///etc/passwd"), "/gone": reply(status="404 Not Found"),
        "/large": web.endless(b"x" * 1000), "/page": reply(b"<html>", content_type="text/html"),
        "/text": reply(b"just a text"), "/svg": reply(b"<svg/>", content_type="image/svg+xml"),
        "/cut": reply(RED[:45]), "/many": reply(png(1001, 1000)), "/drip": web.endless(b"x", 0.05), "/none": reply(b""),
    }  # fmt: skip
    at, vlms = serving(web)
    impatient, _ = serving(web, seconds=0.5)
    expected = {
        "http://169.254.169.254/": (400, "image_url_not_allowed"),
        address(web, "/moved"): (400, "image_url_not_allowed"),
        address(web, "/gone"): (400, "image_url_unreachable"), address(web, "/drip"): (400, "image_url_unreachable"),
        address(web, "/large"): (413, "image_too_large"), address(web, "/many"): (413, "image_too_many_pixels"),
        address(web, "/page"): (400, "image_format"), address(web, "/text"): (400, "image_format"),
        address(web, "/svg"): (400, "image_format"), address(web, "/cut"): (400, "image_undecodable"),
        address(web, "/none"): (400, "image_missing"),
    }  # fmt: skip
    found = {}
    for url in expected:
        answer = await chat(impatient if url.endswith("/drip") else at, url)
        error = answer.json()["error"]
        assert error["param"] == "messages.0.content.0.image_url"
        assert error["message"].startswith("messages.0.content.0.image_url: ")
        found[url] = code_of(answer)
    assert found == expected
    assert vlms.asked == []


async def test_the_images_of_one_request_weigh_no_more_than_a_body(web: WebServer) -> None:
    at, _ = serving(web, max_image_bytes=1024)
    web.pages["/red.png"] = reply(RED + b"\0" * 600)
    parts = [{"type": "image_url", "image_url": {"url": address(web)}} for _ in range(4)]
    async with client(at) as http:
        both = await http.post(CHAT, json={"messages": [{"role": "user", "content": parts}]})
    assert code_of(both) == (413, "image_too_large")
    assert (await chat(at, address(web))).status_code == 200


async def test_the_deadline_of_the_request_ends_the_fetch(web: WebServer) -> None:
    at, _ = serving(web, deadline_seconds=0.2)
    assert code_of(await chat(at, address(web, "/drip"))) == (504, "deadline_exceeded")
    assert await asyncio.to_thread(web.hung_up.wait, 10)


async def test_a_slow_fetch_holds_up_nobody_and_ends_when_its_client_goes(web: WebServer) -> None:
    at, vlms = serving(web, deadline_seconds=60)
    body = json.dumps({"messages": about_image(image=address(web, "/drip"))}).encode()
    visitor = RawRequest(app_of(at), CHAT, body)
    await until(lambda: web.asked)
    assert (await asyncio.wait_for(chat(at, address(web)), 30)).status_code == 200
    assert not visitor.task.done()
    visitor.hang_up()
    await asyncio.wait_for(visitor.task, 10)
    assert await asyncio.to_thread(web.hung_up.wait, 10)
    assert len(vlms.asked) == 1
