from __future__ import annotations

import base64
import pickle
import struct
from array import array
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
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
both = pytest.mark.parametrize("kind", ["sync", "async"])


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as started:
        yield started


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    pause_after = Retries.pause_after

    def noted(self: Retries, error: ServerError) -> float:
        taken.append(pause_after(self, error))
        return 0.0

    monkeypatch.setattr(Retries, "pause_after", noted)
    return taken


@both
def test_vectors_are_arrays_that_numpy_takes(kind: str, server: ScriptedServer) -> None:
    server.answer(200, {"data": [{"embedding": FLOATS}, {"embedding": FLOATS}]})
    vectors = call(kind, server.url, "embed", ["a boat", b"\x89PNG"])
    assert vectors == [array("f", [1.5, -2.0])] * 2
    assert (np.asarray(vectors).dtype, np.asarray(vectors).shape) == (np.float32, (2, 2))
    [(method, path, body)] = server.asked
    assert (method, path, body["encoding_format"]) == ("POST", "/v1/embeddings", "base64")
    assert body["input"] == ["a boat", {"image": "data:image/png;base64,iVBORw=="}]


@both
def test_what_is_not_named_of_a_release_is_not_sent(kind: str, server: ScriptedServer) -> None:
    server.answer(200, {"number": 2})
    assert call(kind, server.url, "release", vlm=None, reason="back to the base") == {"number": 2}
    [(_, path, body)] = server.asked
    assert path == "/admin/v1/releases" and body["vlm"] is None and "clip" not in body


@both
def test_an_error_says_what_the_server_said(kind: str, server: ScriptedServer) -> None:
    server.fail(404, "model_not_found", "there is no clip@9.", x_request_id="r-1")
    with pytest.raises(ServerError, match=r"there is no clip@9\.") as caught:
        call(kind, server.url, "search", "a boat")
    assert (caught.value.status, caught.value.code, caught.value.request_id) == (404, "model_not_found", "r-1")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.code, str(again)) == (ServerError, "model_not_found", str(caught.value))


@both
@pytest.mark.parametrize(
    ("status", "expected"), [(401, Denied), (403, Denied), (409, Conflict), (429, Overloaded), (503, Overloaded)]
)
def test_statuses_that_callers_tell_apart_have_an_error_of_their_own(
    kind: str, status: int, expected: type, server: ScriptedServer
) -> None:
    server.answer(status, b"<html>a proxy</html>", retry_after="7")
    with pytest.raises(RatchetError) as caught:
        call(kind, server.url, "hold", "why")
    assert type(caught.value) is expected and caught.value.fix
    assert (caught.value.status, caught.value.retry_after) == (status, 7.0)


@both
@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"data": 7}', b'{"dota": []}', b'{"data": [{"embedding": "!"}]}'])
def test_an_answer_of_another_form_is_an_error_of_the_server(kind: str, body: bytes, server: ScriptedServer) -> None:
    server.answer(200, body)
    with pytest.raises(ServerError, match="another form"):
        call(kind, server.url, "embed", ["x"])


@both
def test_a_server_that_is_busy_is_asked_again_when_it_said(
    kind: str, server: ScriptedServer, pauses: list[float]
) -> None:
    server.fail(429, "overloaded", retry_after="3")
    server.fail(503, "not_ready", retry_after=format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True))
    server.answer(200, HITS)
    assert call(kind, server.url, "search", "a boat") == HITS["data"]
    assert len(server.asked) == 3 and server.asked[0] == server.asked[2]
    assert 3.0 <= pauses[0] < 4.0 and 20 < pauses[1] < 31


@both
def test_a_connection_that_broke_off_is_made_again(kind: str, server: ScriptedServer, pauses: list[float]) -> None:
    server.answers.append(None)
    server.answer(200, HITS)
    assert call(kind, server.url, "search", "a boat") == HITS["data"]
    assert len(pauses) == 1


@both
def test_tries_end_with_the_last_error(kind: str, server: ScriptedServer, pauses: list[float]) -> None:
    server.fail(503, "unavailable")
    with pytest.raises(Overloaded):
        call(kind, server.url, "search", "a boat", options={"retries": 2})
    assert len(server.asked) == 3
    assert all(0.125 <= pause <= 0.25 * 2**number for number, pause in enumerate(pauses))


@both
def test_what_is_to_wait_longer_than_the_timeout_fails_at_once(kind: str, server: ScriptedServer) -> None:
    server.fail(429, "rate_limited", retry_after="3600")
    with pytest.raises(Overloaded) as caught:
        call(kind, server.url, "search", "a boat")
    assert len(server.asked) == 1 and caught.value.retry_after == 3600


@both
@pytest.mark.parametrize(("method", "args"), OPERATIONS)
@pytest.mark.parametrize("status", [429, 503, 0])
def test_a_call_that_changes_something_is_made_once(
    kind: str, method: str, args: tuple[Any, ...], status: int, server: ScriptedServer
) -> None:
    if status:
        server.fail(status, "overloaded", retry_after="0")
    else:
        server.answers.append(None)
    with pytest.raises(ServerError):
        call(kind, server.url, method, *args)
    assert len(server.asked) == 1


@both
def test_a_server_that_is_away_is_named_with_what_to_do(kind: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unreachable, match=f"{url} does not answer") as caught:
        call(kind, url, "live", options={"retries": 0})
    assert caught.value.fix and caught.value.status == 0
    assert call(kind, url, "why_not_ready", "clip") == "nothing listens there yet."
    with pytest.raises(ServerError, match="not ready within 0 s: nothing listens"):
        call(kind, url, "wait_ready", 0.0)


def test_a_call_that_was_not_answered_in_time_is_not_made_again() -> None:
    retries = Retries(calls_module.live(), 3, 60.0)
    with pytest.raises(TimedOut):
        retries.pause_after(TimedOut("late."))


def test_all_pauses_together_are_shorter_than_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ratchet_client.calls.time.monotonic", lambda: now)
    retries = Retries(calls_module.live(), 100, 20.0)
    with pytest.raises(Overloaded):
        for _ in range(100):
            now += retries.pause_after(Overloaded("busy.", retry_after=6.0))
    assert 1012 < now <= 1020


@both
def test_a_server_without_a_vlm_is_ready(kind: str, server: ScriptedServer) -> None:
    server.answer(200, {"status": "ok"})
    server.fail(404, "no_vlm", "no_vlm: none is served.")
    call(kind, server.url, "wait_ready", 60.0)
    assert [path for _, path, _ in server.asked] == ["/health/ready/clip", "/health/ready/vlm"]


@both
def test_a_key_is_sent_with_every_request(kind: str, server: ScriptedServer) -> None:
    server.answer(200, {"live": 3, "data": []})
    assert call(kind, server.url, "live", options={"key": "rk_1_2"}) == 3
    assert server.asked == [("GET", "/v1/releases?limit=1", None)]
    assert calls_module.headers("rk_1_2", "ann") == {"authorization": "Bearer rk_1_2", "x-ratchet-actor": "ann"}
    assert calls_module.headers(None, "ann") == {"x-ratchet-actor": "ann"}
