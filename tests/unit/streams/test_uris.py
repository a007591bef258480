from __future__ import annotations

import asyncio
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.registry import _registry

from core.addresses import ObjectRule
from core.errors import RecordError
from core.settings.streams import Ingest
from streams.records import uris
from streams.records.fetching import TransientFetchError, parse_retry_after
from streams.records.uris import PROBE_SECONDS, FetchLimits, UriFetcher, pause_before
from tests.support.clock import Clock
from tests.support.web_server import Answer, WebServer, reply, web_server
from tests.unit.streams.conftest import stop_clock

LOOPBACK = ["127.0.0.1/32"]


def fetch(uri: str, allowed: Sequence[str], max_bytes: int = 1000, networks: Sequence[str] = LOOPBACK) -> bytes:
    limits = {**Ingest().model_dump(), "allowed_uris": allowed, "allowed_networks": networks}
    limited = Ingest.model_construct(**{**limits, "max_image_bytes": max_bytes})  # too small to be valid
    with closing(UriFetcher(limited)) as fetcher:
        return fetcher.fetch(uri)


def reason(uri: str, *allowed: str, max_bytes: int = 1000) -> str:
    with pytest.raises(RecordError) as caught:
        fetch(uri, allowed, max_bytes)
    return str(caught.value.reason)


def test_what_lies_under_a_listed_address_is_fetched(web: WebServer) -> None:
    web.pages["/images/a"] = reply(PICTURE)
    for prefix in ("/images/", "/images", "/images/a", ""):
        assert fetch(url(web, "/images/a"), ["file:///nowhere", url(web, prefix)]) == PICTURE
    with pytest.raises(RecordError, match=r"not public.*ingest\.allowed_networks"):
        fetch(url(web), [url(web, "")], networks=())


def test_files_stay_inside_their_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "in-secret"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "a b.png").write_bytes(b"12345")
    (inside / "link").symlink_to(outside / "a b.png")
    allowed = f"file://{inside}"
    assert fetch(f"file://{inside}/a%20b.png", [allowed], 5) == b"12345"
    assert reason(f"file://{inside}/a%20b.png", allowed, max_bytes=4) == "image_too_large"
    for path in (
        f"{outside}/a%20b.png",
        f"{inside}/link",
        f"{inside}/%2e%2e/in-secret/a%20b.png",
        f"host{inside}/a%20b.png",
    ):
        assert reason(f"file://{path}", allowed) == "uri_not_allowed"
    assert reason(f"file://{inside}/none.png", allowed) == reason(f"file://{inside}", allowed) == "uri_unreachable"
    assert reason("file:///dev/zero", "file:///dev") == "uri_unreachable"


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
    with ExitStack() as stack:

        def build(*sites: WebServer, **bounds: Any) -> UriFetcher:
            allowed = [url(each, "/") for each in sites]
            settings = Ingest(allowed_uris=allowed, allowed_networks=["127.0.0.0/8"])
            return stack.enter_context(closing(UriFetcher(settings, **bounds)))

        yield build


def url(web: WebServer, path: str = "/a.png") -> str:
    return f"http://{web.host}:{web.port}{path}"


def refusal(fetcher: UriFetcher, uri: str) -> RecordError:
    with pytest.raises(RecordError) as caught:
        fetcher.fetch(uri)
    return caught.value


def first(*answers: Answer) -> Callable[[socket.socket], None]:
    """Answer with these in order; the last one repeats."""
    left = list(answers)

    def send(wire: socket.socket) -> None:
        answer = left.pop(0) if len(left) > 1 else left[0]
        wire.sendall(answer) if isinstance(answer, bytes) else answer(wire)

    return send


def hang_up(wire: socket.socket) -> None:
    """No answer at all."""


def silent_until(event: threading.Event, arrived: threading.Event | None = None) -> Callable[[socket.socket], None]:
    """No answer before the event; ``arrived`` is set by the request."""

    def wait_for_it(wire: socket.socket) -> None:
        if arrived is not None:
            arrived.set()
        event.wait(LONG)

    return wait_for_it


def test_a_host_that_does_not_answer_holds_up_no_other(web: WebServer, make: Make) -> None:
    release = threading.Event()
    with web_server("127.0.0.2") as silent:
        silent.pages["/a.png"] = silent_until(release)
        fetcher = make(web, silent, fetches=8)
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
    web.pages |= {"/b.png": first(failure, failure, reply(PICTURE)), "/c.png": reply(status="503 x")}
    fetcher = make(web)
    assert fetcher.fetch(url(web, "/b.png")) == PICTURE
    assert len(web.asked) == 3
    error = refusal(fetcher, url(web, "/c.png"))
    assert (error.reason, len(web.asked)) == ("uri_unreachable", 3 + 4)
    assert "answers 503. Tries: 4." in error.message


def test_a_server_that_stalls_is_tried_again_within_the_deadline(web: WebServer, make: Make) -> None:
    silence = threading.Event()
    web.pages |= {"/late": first(silent_until(silence), reply(PICTURE)), "/never": silent_until(silence)}
    fetcher = make(web, seconds=0.4)
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


HOST = "cdn.test:80"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return stop_clock(monkeypatch, uris)


async def use(limits: FetchLimits, outcome: Exception | None = None, host: str = HOST) -> None:
    async with limits.seat(host):
        if outcome is not None:
            raise outcome


async def fail(limits: FetchLimits, host: str = HOST) -> None:
    with pytest.raises(TransientFetchError):
        await use(limits, TransientFetchError("down"), host)


async def test_the_window_of_a_host_grows_with_answers_and_is_one_after_a_failure() -> None:
    limits = FetchLimits(16, 30.0)
    assert await most_at_once(limits) == 4
    assert await most_at_once(limits) == 16, "all of the 40 were answered"
    await fail(limits)
    assert await most_at_once(limits, 1) == 1
    with pytest.raises(RecordError):  # "404" is an answer
        await use(limits, RecordError("uri_unreachable", "answers 404."))
    assert await most_at_once(limits) == 4


async def most_at_once(limits: FetchLimits, fetches: int = 40) -> int:
    """Number of seats that the host gets at once; then all of the fetches are answered."""
    inside, leave = 0, asyncio.Event()

    async def hold() -> None:
        nonlocal inside
        async with limits.seat(HOST):
            inside += 1
            await leave.wait()

    tasks = [asyncio.create_task(hold()) for _ in range(fetches)]
    await asyncio.sleep(0)  # each runs until it waits
    first = inside
    leave.set()
    await asyncio.gather(*tasks)
    return first


async def test_a_host_that_is_down_is_tried_by_one_at_a_time_and_refused_to_others(clock: Clock) -> None:
    limits = FetchLimits(8, 30.0)
    await fail(limits)
    clock.now += 20
    await fail(limits)  # within the time of one image: it may come back
    clock.now += 11
    await fail(limits)  # the probe
    with pytest.raises(RecordError, match="has not answered for 31 s"):
        await use(limits)
    await use(limits, host="other.test:80")
    clock.now += PROBE_SECONDS
    await use(limits)  # the next probe is answered
    await use(limits)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0.0), (" 120 ", 120.0), ("Thu, 01 Jan 2026 00:00:30 GMT", 30.0), ("Wed, 31 Dec 2025 23:00:00 GMT", 0.0),
     ("", None), ("soon", None), ("-5", None), ("1.5", None), ("²", None), ("9" * 400, 999999999.0)],
)  # fmt: skip
def test_pauses_grow_are_spread_and_are_at_least_what_the_server_asks(
    monkeypatch: pytest.MonkeyPatch, text: str, seconds: float | None
) -> None:
    monkeypatch.setattr(uris, "FIRST_PAUSE_SECONDS", 0.25)
    for retry, longest in ((1, 0.25), (3, 1.0), (9, 8.0)):
        pauses = [pause_before(retry) for _ in range(50)]
        assert all(longest / 2 <= each <= longest for each in pauses) and len(set(pauses)) > 10
    assert pause_before(1, 7.0) == 7.0
    assert parse_retry_after(text, datetime(2026, 1, 1, tzinfo=UTC)) == seconds


# -- object stores --------------------------------------------------------------------------------------------------


class Store(AsyncFileSystem):  # type: ignore[misc]
    """A store of another kind, in memory. A key names the failure of its read."""

    protocol = "gs"
    asked: list[str] = []  # noqa: RUF012
    errors: dict[str, Exception] = {  # noqa: RUF012
        "denied": PermissionError(), "bad": OSError(22, "invalid"), "busy": OSError(16, "SlowDown"),
        "reset": EOFError(),
    }  # fmt: skip

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        self.asked.append(path)
        key = path.rpartition("/")[2]
        if key == "none":
            raise FileNotFoundError(path)
        if key in self.errors:
            raise self.errors[key]
        return {"name": path, "size": 2000 if key == "large" else 5, "type": "file"}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        return (b"x" * 5000 if path.endswith("grown") else b"12345")[start:end]


@pytest.fixture
def objects(monkeypatch: pytest.MonkeyPatch) -> Iterator[UriFetcher]:
    monkeypatch.setattr(Store, "asked", [])
    monkeypatch.setitem(_registry, "gs", Store)
    with closing(UriFetcher(Ingest(allowed_uris=["gs://pictures/in"], max_image_bytes=1024))) as made:
        yield made


def test_an_object_under_the_prefix_is_read_and_others_are_not_even_asked_for(objects: UriFetcher) -> None:
    others = [
        "s3://pictures/in/a.png", "gs://other/in/a.png", "gs://pictures/inside/a.png", "gs://pictures/",
        "gs://pictures/in/../a.png", "gs://pictures/in/./a", "gs://pictures/in\\..\\a", "gs:///in/a",
        "gs://pictures/in/\0", "GS://pictures/in/a.png", "gs://pictures/in/" + "a" * 1024, "gs://u:p@pictures/in/a",
        "gs://pictures/in/\ud800",
    ]  # fmt: skip
    assert {refusal(objects, each).reason for each in others} == {"uri_not_allowed"}
    assert Store.asked == []
    assert objects.fetch("gs://pictures/in/a.png") == objects.fetch("gs://pictures/in") == b"12345"
    for name in ("large", "grown"):
        assert refusal(objects, f"gs://pictures/in/{name}").reason == "image_too_large"


@pytest.mark.parametrize(
    ("key", "tries"), [("none", 1), ("denied", 1), ("bad", 1), ("busy", 4), ("reset", 4)]
)  # fmt: skip
def test_only_what_may_pass_is_tried_again(objects: UriFetcher, key: str, tries: int) -> None:
    assert refusal(objects, f"gs://pictures/in/{key}").reason == "uri_unreachable"
    assert len(Store.asked) == tries


def test_a_missing_package_is_named_and_an_entry_that_cannot_be_meant_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with closing(UriFetcher(Ingest(allowed_uris=["s3://pictures/"]))) as fetcher:
        error = refusal(fetcher, "s3://pictures/a.png")
    assert error.reason == "uri_not_allowed" and 'pip install "ratchet-server[s3]"' in error.fix
    for text in ("s3://", "s3:///a", "s3://b", "s3://bucket/../x", "s3://*/x", "S3://bucket", "s3://b c/x"):
        with pytest.raises(ValueError, match="s3://"):
            ObjectRule.parse(text)
