"""A store that hangs for minutes while a key searches all the time: requests that need no store are answered."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks.serving.object_store import URL, ObjectStore
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(900)]
HANGS_SECONDS, SEARCHES_PER_SECOND, SEARCHES_PER_EMBEDDING = 150.0, 12.0, 17
LONGEST_SEARCH_SECONDS = 15.0
"""Ten for requests that wait for the store, and a margin for a busy machine."""


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path / "objects.log") as store:
        yield store


@pytest.fixture
def own_server(objects: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerFixture]:
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


def timed(ask: Callable[[], httpx.Response]) -> tuple[str, float]:
    """The status, or the error, of a request, and its seconds."""
    began = time.monotonic()
    try:
        status = str(ask().status_code)
    except httpx.HTTPError as error:
        status = type(error).__name__
    return status, time.monotonic() - began


def test_embeddings_are_answered_while_the_store_hangs_and_one_key_searches(
    own_server: ServerFixture, objects: ObjectStore
) -> None:
    _, token = own_server.ledger.create_key("one", ["infer", "search"], actor="test")
    texts = iter(range(1_000_000))
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
    key = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=own_server.url, timeout=60, limits=limits, trust_env=False, headers=key) as http:

        def search() -> httpx.Response:
            return http.post("/v1/search", json={"text": f"a red circle {next(texts)}", "k": 3})

        def embed() -> httpx.Response:
            return http.post("/v1/embeddings", json={"input": f"a blue one {next(texts)}"})

        own_server.until(lambda: search().status_code == 200 and search().json()["data"])
        searches, embeddings = [], []
        with ThreadPoolExecutor(500) as pool, objects.suspended():
            began = time.monotonic()
            while (due := began + len(searches) / SEARCHES_PER_SECOND) < began + HANGS_SECONDS:
                time.sleep(max(0.0, due - time.monotonic()))
                if len(searches) % SEARCHES_PER_EMBEDDING == 0:
                    embeddings.append(pool.submit(timed, embed))
                searches.append(pool.submit(timed, search))
            searched, embedded = ([each.result() for each in sent] for sent in (searches, embeddings))
        own_server.until(lambda: search().status_code == 200)
    told = {"searches": Counter(status for status, _ in searched), "embeddings": Counter(s for s, _ in embedded)}
    assert set(told["embeddings"]) == {"200"} and len(embedded) > 90, told
    slowest = max(seconds for _, seconds in searched)
    assert len(searched) > 1000 and slowest < LONGEST_SEARCH_SECONDS, slowest
    assert set(told["searches"]) <= {"200", "503", "429"}, told
