from __future__ import annotations

import base64
import struct
from array import array
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from typing import Any

import numpy as np
import pytest

from core.addresses import free_port
from ratchet_client import Conflict, Denied, Overloaded, RatchetError, ServerError, TimedOut, Unreachable
from ratchet_client import calls as calls_module
from ratchet_client.calls import Retries
from tests.unit.client.scripted_server import ScriptedServer, call, scripted_server

FLOATS = base64.b64encode(struct.pack("<2f", 1.5, -2.0)).decode()
HITS = {"data": [{"id": "a", "score": 0.5}]}
OPERATIONS: list[tuple[str, tuple[Any, ...]]] = [
    ("release", ("clip-a", "right")),
    ("rollback", ("wrong",)),
    ("promote", ("well",)),
    ("hold", ("wait",)),
    ("resume", ("go on",)),
    ("post", ("/admin/v1/anything", {})),
]
Ask = Callable[..., Any]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as started:
        yield started


@pytest.fixture(params=["sync", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def ask(kind: str, server: ScriptedServer) -> Ask:
    """Calls a method of either client at the server."""
    return partial(call, kind, server.url)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    pause_after = Retries.pause_after

    def noted(self: Retries, error: ServerError) -> float:
        taken.append(pause_after(self, error))
        return 0.0

    monkeypatch.setattr(Retries, "pause_after", noted)
    return taken


def test_vectors_are_arrays_that_numpy_takes(ask: Ask, server: ScriptedServer) -> None:
    server.answer(200, {"data": [{"embedding": FLOATS}, {"embedding": FLOATS}]})
    vectors = ask("embed", ["a boat", b"\x89PNG"])
    assert vectors == [array("f", [1.5, -2.0])] * 2
    assert (np.asarray(vectors).dtype, np.asarray(vectors).shape) == (np.float32, (2, 2))
    [(method, path, body)] = server.asked
    assert (method, path, body["encoding_format"]) == ("POST", "/v1/embeddings", "base64")
    assert body["input"] == ["a boat", {"image": "data:image/png;base64,iVBORw=="}]


def test_a_least_probability_is_sent_where_one_is_given(ask: Ask, server: ScriptedServer) -> None:
    server.answer(200, HITS)
    ask("search", "a boat", min_probability=0.5)
    ask("classify", [b"\x89PNG"], ["boat"], min_probability=0.9)
    ask("classify", [b"\x89PNG"], ["boat"])
    first, second, third = (body for _, _, body in server.asked)
    assert (first["min_probability"], second["min_probability"]) == (0.5, 0.9) and "min_probability" not in third


def test_documents_to_rerank_are_texts_pictures_and_samples(ask: Ask, server: ScriptedServer) -> None:
    server.answer(body={"id": "r", "model": "vlm@1", "results": [{"index": 1, "relevance_score": 0.9}]})
    [best] = ask("rerank", "a red bus", ["x", b"png", {"id": "0" * 64}], top_n=1)
    assert best == {"index": 1, "relevance_score": 0.9}
    (method, path, body), *_ = server.asked
    assert (method, path, body["query"], body["top_n"]) == ("POST", "/v1/rerank", "a red bus", 1)
    assert body["documents"] == ["x", {"image": calls_module.data_uri(b"png")}, {"id": "0" * 64}]


def test_what_is_not_named_of_a_release_is_not_sent_and_a_key_is_with_every_request(
    ask: Ask, server: ScriptedServer
) -> None:
    server.answer(200, {"number": 2})
    assert ask("release", vlm=None, reason="back to the base") == {"number": 2}
    [(_, path, body)] = server.asked
    assert path == "/admin/v1/releases" and body["vlm"] is None and "clip" not in body
    server.answers.clear()
    server.answer(200, {"live": 3, "data": []})
    assert ask("live", options={"key": "rk_1_2"}) == 3
    assert server.asked[1] == ("GET", "/v1/releases?limit=1", None)
    assert calls_module.headers("rk_1_2", "ann") == {"authorization": "Bearer rk_1_2", "x-ratchet-actor": "ann"}
    assert calls_module.headers(None, "ann") == {"x-ratchet-actor": "ann"}


@pytest.mark.parametrize(
    ("status", "expected"), [(401, Denied), (403, Denied), (409, Conflict), (429, Overloaded), (503, Overloaded)]
)
def test_statuses_that_callers_tell_apart_have_an_error_of_their_own(
    ask: Ask, server: ScriptedServer, status: int, expected: type
) -> None:
    server.answer(status, b"<html>a proxy</html>", retry_after="7")
    with pytest.raises(RatchetError) as caught:
        ask("hold", "why")
    assert type(caught.value) is expected and caught.value.fix
    assert (caught.value.status, caught.value.retry_after) == (status, 7.0)


def test_a_server_that_is_busy_or_broke_off_is_asked_again(
    ask: Ask, server: ScriptedServer, pauses: list[float]
) -> None:
    server.fail(429, "overloaded", retry_after="3")
    server.fail(503, "not_ready", retry_after=format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True))
    server.answers.append(None)
    server.answer(200, HITS)
    assert ask("search", "a boat") == HITS["data"]
    assert len(server.asked) == 4 and server.asked[0] == server.asked[3]
    assert 3.0 <= pauses[0] < 4.0 and 20 < pauses[1] < 31 and len(pauses) == 3, "when it said"


def test_all_pauses_together_are_shorter_than_the_timeout_and_none_follows_one(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ratchet_client.calls.time.monotonic", lambda: now)
    retries = Retries(calls_module.live(), 100, 20.0)
    with pytest.raises(Overloaded):
        for _ in range(100):
            now += retries.pause_after(Overloaded("busy.", retry_after=6.0))
    assert 1012 < now <= 1020
    with pytest.raises(TimedOut):
        Retries(calls_module.live(), 3, 60.0).pause_after(TimedOut("late."))


@pytest.mark.parametrize(("method", "args"), OPERATIONS)
@pytest.mark.parametrize("status", [429, 503, 0])
def test_a_call_that_changes_something_is_made_once(
    ask: Ask, server: ScriptedServer, method: str, args: tuple[Any, ...], status: int
) -> None:
    if status:
        server.fail(status, "overloaded", retry_after="0")
    else:
        server.answers.append(None)
    with pytest.raises(ServerError):
        ask(method, *args)
    assert len(server.asked) == 1


def test_a_server_that_is_away_is_named_with_what_to_do(kind: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable, match=f"{url} does not answer") as caught:
        call(kind, url, "live", options={"retries": 0})
    assert caught.value.fix and caught.value.status == 0
    assert call(kind, url, "why_not_ready", "clip") == "nothing listens there yet."
    with pytest.raises(ServerError, match="not ready within 0 s: nothing listens"):
        call(kind, url, "wait_ready", 0.0)
