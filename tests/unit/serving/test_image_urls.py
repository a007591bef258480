from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import pytest

from core.settings.serving import Serve
from serving.engines.preprocess import Preprocess
from serving.http.app_state import AppState
from serving.http.image_loader import ImageLoader, fetcher_of
from tests.support.waiting import until
from tests.support.web_server import WebServer, redirect, reply, web_server
from tests.unit.serving.scripted_vlms import (
    SETTINGS,
    ScriptedVlms,
    Visitor,
    about_image,
    app_of,
    app_state,
    client,
    png,
)

RED = png()


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as made:
        made.pages["/red.png"] = reply(RED)
        yield made


def fetching(web: WebServer, **more: Any) -> Serve:
    settings = {"image_hosts": [f"cdn.test:{web.port}"], "image_networks": ["127.0.0.1/32"], "max_image_bytes": 32_768}
    return Serve(**{**SETTINGS.model_dump(), **settings, **more})


def serving(settings: Serve, seconds: float = 60) -> tuple[AppState, ScriptedVlms]:

    async def loopback(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    vlms = ScriptedVlms()
    fetcher = fetcher_of(settings, seconds)
    assert fetcher is not None
    fetcher.resolve = loopback
    return replace(app_state(vlms, settings), image_loader=ImageLoader(Preprocess(size=16), settings, fetcher)), vlms


async def chat(at: AppState, address: str) -> httpx.Response:
    async with client(at) as http:
        return await http.post("/v1/chat/completions", json={"messages": about_image(image=address)})


def address(web: WebServer, path: str = "/red.png") -> str:
    return f"http://cdn.test:{web.port}{path}"


async def test_a_url_and_a_data_uri_of_one_image_are_the_same_to_the_model(web: WebServer) -> None:
    at, vlms = serving(fetching(web))
    async with client(at) as http:
        answers = [
            await http.post("/v1/chat/completions", json={"messages": about_image(image=image)})
            for image in (None, address(web))
        ]
        answers.append(await http.post("/v1/vqa", json={"image": address(web), "question": "what is it?"}))
    assert [answer.status_code for answer in answers] == [200, 200, 200]
    sent, *fetched = [ask.images[0] for ask, _ in vlms.asked]
    assert all((picture == sent).all() for picture in fetched)


async def test_nothing_is_fetched_unless_a_host_is_listed(web: WebServer) -> None:
    for url in (address(web), "HTTP://169.254.169.254/latest", "https://example.org/a.png"):
        answer = await chat(app_state(ScriptedVlms()), url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "image_url_off")
    assert web.asked == []


async def test_each_refusal_has_its_code_and_its_place(web: WebServer) -> None:
    web.pages |= {
        "/moved": redirect("file:///etc/passwd"), "/gone": reply(status="404 Not Found"),
        "/large": web.endless(b"x" * 1000), "/page": reply(b"<html>", content_type="text/html"),
        "/text": reply(b"just a text"), "/svg": reply(b"<svg/>", content_type="image/svg+xml"),
        "/cut": reply(RED[:45]), "/many": reply(png(1001, 1000)), "/drip": web.endless(b"x", 0.05), "/none": reply(b""),
    }  # fmt: skip
    at, vlms = serving(fetching(web))
    impatient, _ = serving(fetching(web), seconds=0.5)
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
        found[url] = (answer.status_code, error["code"])
    assert found == expected
    assert vlms.asked == []


async def test_the_images_of_one_request_weigh_no_more_than_a_body(web: WebServer) -> None:
    at, _ = serving(fetching(web, max_image_bytes=1024))
    web.pages["/red.png"] = reply(RED + b"\0" * 600)
    async with client(at) as http:
        parts = [{"type": "image_url", "image_url": {"url": address(web)}} for _ in range(4)]
        both = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts}]})
        one = await http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": parts[:1]}]})
    assert (both.status_code, both.json()["error"]["code"]) == (413, "image_too_large")
    assert one.status_code == 200


async def test_the_deadline_of_the_request_ends_the_fetch(web: WebServer) -> None:
    web.pages["/drip"] = web.endless(b"x", 0.01)
    at, _ = serving(fetching(web, deadline_seconds=0.2))
    answer = await chat(at, address(web, "/drip"))
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert await asyncio.to_thread(web.hung_up.wait, 10)


async def test_nothing_is_fetched_for_a_client_that_has_gone(web: WebServer) -> None:
    web.pages["/drip"] = web.endless(b"x", 0.01)
    at, vlms = serving(fetching(web, deadline_seconds=60))
    body = json.dumps({"messages": about_image(image=address(web, "/drip"))}).encode()
    visitor = Visitor(app_of(at), "/v1/chat/completions", body)
    running = visitor.start()
    await until(lambda: web.asked)
    visitor.gone.set()
    await asyncio.wait_for(running, 10)
    assert await asyncio.to_thread(web.hung_up.wait, 10)
    assert vlms.asked == []


async def test_others_are_answered_while_a_slow_server_is_waited_for(web: WebServer) -> None:
    web.pages["/drip"] = web.endless(b"x", 0.01)
    at, _ = serving(fetching(web, deadline_seconds=60))
    slow = asyncio.create_task(chat(at, address(web, "/drip")))
    await until(lambda: web.asked)
    began = time.monotonic()
    assert (await chat(at, address(web))).status_code == 200
    assert not slow.done() and time.monotonic() - began < 30
    slow.cancel()
    await asyncio.gather(slow, return_exceptions=True)
