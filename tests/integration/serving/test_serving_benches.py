"""Small runs of the serving benchmarks on the server of the other tests, and servers whose stores hang or fail."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from benchmarks import hostile, soak
from benchmarks.serving import chaos
from benchmarks.serving.object_store import URL, ObjectStore
from benchmarks.swap import Swaps
from core.loading import load_settings
from tests.integration.serving.server_fixture import ServerFixture

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
HANGS_SECONDS, SEARCHES_PER_SECOND, SEARCHES_PER_EMBEDDING = 150.0, 12.0, 17
LONGEST_SEARCH_SECONDS = 15.0
"""Ten for requests that wait for the store, and a margin for a busy machine."""
STATES = ("ledger-killed", "objects-away", "encoder-killed", "controller-killed")


def test_a_soak_sees_no_failure_and_measures_each_process(server: ServerFixture) -> None:
    swaps = Swaps([server.adapter(), server.adapter()], [])
    figures = soak.measure(
        server.settings, server.url, swaps, server.images, (), seconds=4.0, every=0.5, warm_seconds=1.0, share=0.5,
        capacity_seconds=1.0,
    )  # fmt: skip
    assert (figures["failed"], figures["mixed"]) == (0, 0), figures
    assert figures["swaps"] == 8 and figures["rollbacks"] == 2
    assert figures["requests"] > 0 and figures["processes"] >= 5
    assert figures["processes_ended"] == []


def test_a_good_client_is_answered_beside_hostile_ones(server: ServerFixture) -> None:
    figures = hostile.measure(server.settings, hostile.plan(vlm=False, scale=0.2), seconds=2.0, rate=5.0)
    assert figures["good_failed"] == 0, figures
    assert figures["good_requests"] > 20
    assert figures["attacks"]["picture_bombs"]["answers"].keys() <= {"200", "429", "closed"}
    assert all(figures["attacks"][name]["answers"] for name in ("picture_bombs", "health_flood"))
    assert set(figures["attacks"]["health_flood"]["answers"]) == {"200", "429"}
    assert 0 < figures["rss_max_gib"] < 16


def test_a_silent_crowd_of_one_address_is_cut_off_at_its_bound(server: ServerFixture) -> None:
    silent = hostile.plan(vlm=False, scale=0.3)["silent"]  # 1,260 connections within 5 s, of which 512 may stay
    figures = hostile.measure(server.settings, {"silent": silent}, seconds=4.0, rate=5.0)
    assert figures["good_failed"] == 0, figures
    answers = figures["attacks"]["silent"]["answers"]
    assert answers.get("closed", 0) + answers.get("refused", 0) > 50


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, because Ray's and PostgreSQL's sockets are named after it."""
    folder = Path(tempfile.mkdtemp(prefix="rc-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_requests_are_answered_and_rollbacks_go_through_while_stores_and_processes_fail(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = chaos.run(load_settings(environ={}), 24, STATES, seed=1, rate=4.0, vlm_engine="", folder=folder)
    chaos.show(figures)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == figures
    assert {name: figures[name] for name in chaos.VIOLATIONS} == dict.fromkeys(chaos.VIOLATIONS, 0), figures
    assert {state["state"] for state in figures["states"]} == set(STATES)
    assert all(state["requests"] > 0 < state["rollbacks"] for state in figures["states"])
    assert figures["kills"] > 0 < figures["refusals"]


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
