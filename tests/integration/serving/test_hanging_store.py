"""A store that hangs for minutes while a key searches all the time: requests that need no store are answered."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from benchmarks.serving.object_store import URL, ObjectStore
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
HANGS_SECONDS, SEARCHES_PER_SECOND, EMBEDDINGS_PER_SECOND = 150.0, 12.0, 0.7
LONGEST_SEARCH_SECONDS = 15.0
"""Ten for requests that wait for the store, and a margin for a busy machine."""


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path / "objects.log") as store:
        yield store


@pytest.fixture
def server(objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerFixture]:
    for name, value in objects.environment().items():
        monkeypatch.setenv(name, value)
    made = ServerFixture.make(tmp_path / "home", encoder_replicas=1)
    made.configure(lake_url=f"{URL}/lake")
    made.add_samples(40)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def asked(ask: Callable[[], httpx.Response], rate: float, over: threading.Event) -> list[tuple[str, float]]:
    """Send requests at this rate without waiting for answers. Returns the status and the seconds of each."""

    def one() -> tuple[str, float]:
        began = time.monotonic()
        try:
            status = str(ask().status_code)
        except httpx.HTTPError as error:
            status = type(error).__name__
        return status, time.monotonic() - began

    with ThreadPoolExecutor(400) as pool:
        sent = []
        due = time.monotonic()
        while not over.wait(max(0.0, due - time.monotonic())):
            sent.append(pool.submit(one))
            due += 1 / rate
        return [each.result() for each in sent]


def test_embeddings_are_answered_while_the_store_hangs_and_one_key_searches(
    server: ServerFixture, objects: ObjectStore
) -> None:
    _, token = server.ledger.create_key("one", ["infer", "search"], actor="test")
    texts = iter(range(1_000_000))
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        http = stack.enter_context(httpx.Client(base_url=server.url, timeout=60, limits=limits, trust_env=False))
        http.headers["authorization"] = f"Bearer {token}"

        def search() -> httpx.Response:
            return http.post("/v1/search", json={"text": f"a red circle {next(texts)}", "k": 3})

        def embed() -> httpx.Response:
            return http.post("/v1/embeddings", json={"input": f"a blue one {next(texts)}"})

        server.until(lambda: search().status_code == 200 and search().json()["data"])
        over = threading.Event()
        searches = pool.submit(asked, search, SEARCHES_PER_SECOND, over)
        embeddings = pool.submit(asked, embed, EMBEDDINGS_PER_SECOND, over)
        with objects.suspended():
            time.sleep(HANGS_SECONDS)
            over.set()
            searched, embedded = searches.result(), embeddings.result()
        server.until(lambda: search().status_code == 200)
    slowest = {"search": max(seconds for _, seconds in searched), "embedding": max(seconds for _, seconds in embedded)}
    told = {"searches": Counter(each for each, _ in searched), "embeddings": Counter(each for each, _ in embedded)}
    assert set(told["embeddings"]) == {"200"} and len(embedded) > 90, told
    assert len(searched) > 1000 and slowest["search"] < LONGEST_SEARCH_SECONDS, slowest
    assert set(told["searches"]) <= {"200", "503", "429"}, told
