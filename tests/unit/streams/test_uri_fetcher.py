"""Images by URI come at once, again after a failure that may pass, and in a time that is bounded."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from core.errors import RecordError
from core.settings.streams import Ingest
from streams.records import uris
from streams.records.uris import UriFetcher
from tests.support.web_server import Answer, WebServer, reply, web_server

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
LONG = 20.0
Make = Callable[..., UriFetcher]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uris, "FIRST_PAUSE_SECONDS", 0.01)


@pytest.fixture
def web() -> Iterator[WebServer]:
    with web_server() as running:
        running.pages["/a.png"] = reply(PICTURE)
        yield running


@pytest.fixture
def make() -> Iterator[Make]:
    """Makes fetchers that may fetch from this machine, and closes them."""
    fetchers: list[UriFetcher] = []

    def build(*sites: WebServer, **limits: Any) -> UriFetcher:
        allowed = [url(each, "/") for each in sites]
        fetchers.append(UriFetcher(Ingest(allowed_uris=allowed, allowed_networks=["127.0.0.0/8"], **limits)))
        return fetchers[-1]

    yield build
    for fetcher in fetchers:
        fetcher.close()


def url(web: WebServer, path: str = "/a.png") -> str:
    return f"http://{web.host}:{web.port}{path}"


def refusal(fetcher: UriFetcher, uri: str) -> RecordError:
    with pytest.raises(RecordError) as caught:
        fetcher.fetch(uri)
    return caught.value


def first(*answers: Answer) -> Callable[[socket.socket], None]:
    """Answers with one after the other; the last one stays."""
    left = list(answers)

    def send(wire: socket.socket) -> None:
        answer = left.pop(0) if len(left) > 1 else left[0]
        wire.sendall(answer) if isinstance(answer, bytes) else answer(wire)

    return send


def hang_up(wire: socket.socket) -> None:
    """No answer at all."""


def silent_until(event: threading.Event, arrived: threading.Event | None = None) -> Callable[[socket.socket], None]:
    """No answer before the event; ``arrived`` is set when it is asked for."""

    def wait_for_it(wire: socket.socket) -> None:
        if arrived is not None:
            arrived.set()
        event.wait(LONG)

    return wait_for_it


def test_as_many_as_the_setting_says_are_in_flight_from_one_thread_each(web: WebServer, make: Make) -> None:
    lock, now, most = threading.Lock(), 0, 0
    threads: set[str] = set()
    few, many = threading.Barrier(8), threading.Barrier(32)

    def together(barrier: threading.Barrier) -> Callable[[socket.socket], None]:
        def send(wire: socket.socket) -> None:
            nonlocal now, most
            with lock:
                now += 1
                most = max(most, now)
            barrier.wait(LONG)  # passes when so many are in flight, or never
            with lock:
                now -= 1
            threads.update(each.name for each in threading.enumerate() if each.name == "uris")
            wire.sendall(reply(PICTURE))

        return send

    web.pages |= {"/few": together(few), "/many": together(many)}
    fetcher = make(web, uri_seconds=4 * LONG)  # a second try of one would be one too many at a barrier
    uris = [url(web, "/few")] * 32 + [url(web, "/many")] * 64
    with ThreadPoolExecutor(64) as workers:
        assert list(workers.map(fetcher.fetch, uris)) == [PICTURE] * 96
    assert (most, threads) == (32, {"uris"})


def test_a_host_that_does_not_answer_holds_up_no_other(web: WebServer, make: Make) -> None:
    release = threading.Event()
    with web_server("127.0.0.2") as silent:
        silent.pages["/a.png"] = silent_until(release)
        fetcher = make(web, silent, uri_concurrency=8)
        stuck = [fetcher.submit(url(silent)) for _ in range(40)]
        flowing = [fetcher.submit(url(web)) for _ in range(40)]
        assert [each.result(LONG) for each in flowing] == [PICTURE] * 40
        assert not any(each.done() for each in stuck)
        assert len(silent.asked) <= 2, "a quarter of the seats"
        fetcher.close()
        release.set()
    assert all(each.cancelled() for each in stuck)


@pytest.mark.parametrize(
    "failure",
    [*(reply(status=f"{code} x", retry_after="0") for code in (408, 425, 429, 500, 502, 503, 504, 599)), hang_up,
     reply(PICTURE, content_length="5000")],
)  # fmt: skip
def test_what_may_pass_is_tried_again(web: WebServer, make: Make, failure: Answer) -> None:
    web.pages["/b.png"] = first(failure, failure, reply(PICTURE))
    assert make(web).fetch(url(web, "/b.png")) == PICTURE
    assert len(web.asked) == 3


def test_the_number_of_tries_is_bounded_and_told(web: WebServer, make: Make) -> None:
    web.pages["/b.png"] = reply(status="503 x")
    error = refusal(make(web), url(web, "/b.png"))
    assert (error.reason, len(web.asked)) == ("uri_unreachable", 4)
    assert "answers 503. Tries: 4." in error.message


def test_a_server_that_stalls_is_tried_again_within_the_deadline(web: WebServer, make: Make) -> None:
    silence = threading.Event()
    web.pages["/late"] = first(silent_until(silence), reply(PICTURE))
    web.pages["/never"] = silent_until(silence)
    fetcher = make(web, uri_seconds=0.4)
    assert fetcher.fetch(url(web, "/late")) == PICTURE
    assert refusal(fetcher, url(web, "/never")).reason == "uri_unreachable"
    assert 3 < len(web.asked) < 8
    silence.set()


def test_closing_cancels_what_waits_and_says_nothing_about_the_record(web: WebServer, make: Make) -> None:
    arrived, release = threading.Event(), threading.Event()
    web.pages["/slow"] = silent_until(release, arrived)
    fetcher = make(web)
    with ThreadPoolExecutor(1) as worker:
        waiting = worker.submit(fetcher.fetch, url(web, "/slow"))
        assert arrived.wait(LONG)
        fetcher.close()
        wait([waiting], LONG)
        assert isinstance(waiting.exception(), asyncio.CancelledError)
        assert not isinstance(waiting.exception(), Exception)
    release.set()
    fetcher.close()
    assert "uris" not in {each.name for each in threading.enumerate()}
    with pytest.raises(asyncio.CancelledError, match="closed"):
        fetcher.fetch(url(web))


def test_without_a_list_nothing_is_fetched_and_no_thread_is_started(web: WebServer) -> None:
    fetcher = UriFetcher(Ingest())
    for uri in (url(web), "s3://bucket/a.png", "gs://bucket/a.png", "file:///etc/passwd", "data:,x", ""):
        assert refusal(fetcher, uri).reason == "uri_not_allowed"
    assert "uris" not in {each.name for each in threading.enumerate()}
    fetcher.close()
