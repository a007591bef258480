from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import httpx
import pytest

from serving.http import calls as module
from serving.http.app_state import AppState
from serving.http.calls import VlmCalls
from serving.ray.deployment_status import DeploymentStatus, cause_of
from tests.support.waiting import until
from tests.unit.serving.auth_app import refusal
from tests.unit.serving.scripted_vlms import ScriptedVlms, about_image, client
from tests.unit.serving.test_calls import Handle
from tests.unit.serving.test_probes import Models, state_of

TRACEBACK = """A replica failed to start with exception. Retrying 999998 more time(s). Error:
Traceback (most recent call last):
  File "/app/serving/replicas/vlm.py", line 60, in _start
    engine = open_engine(base)
core.errors.BaseModelError: Base 'tiny-vlm': model.safetensors is missing. Fix: build it again.
"""
STARTING = "the VLM is starting."


class Serve:
    """Reports ``status`` of the VLM's deployment, and counts calls."""

    def __init__(self, status: DeploymentStatus | None = None) -> None:
        self.status = status
        self.looks = 0

    def read(self) -> DeploymentStatus | None:
        self.looks += 1
        return self.status


RUNNING = DeploymentStatus({"RUNNING": 1}, False, "")


def calls(read_status: Callable[[], DeploymentStatus | None]) -> VlmCalls:
    return VlmCalls(Handle(), 1, read_status)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.001)


async def test_why_it_cannot_start_is_said_until_a_replica_runs(caplog: pytest.LogCaptureFixture) -> None:
    serve = Serve()
    vlms = calls(serve.read)
    assert vlms.start_problem == STARTING
    waiting = asyncio.create_task(vlms.wait_started())
    await until(lambda: serve.looks > 1)
    assert vlms.start_problem == STARTING
    serve.status = DeploymentStatus({"STARTING": 1}, False, "MemoryError: no room")
    await until(lambda: serve.looks > 5)
    assert vlms.start_problem == "the VLM is starting again, after it failed: MemoryError: no room"
    assert [record.levelname for record in caplog.records] == ["ERROR"]  # once, not with each look
    serve.status = RUNNING
    await waiting
    assert vlms.start_problem == ""


async def test_a_process_that_takes_the_place_of_another_knows_at_once_that_the_vlm_runs() -> None:
    vlms = calls(lambda: RUNNING)
    await vlms.look()
    assert vlms.start_problem == ""


async def test_serve_that_does_not_answer_holds_up_nothing() -> None:
    hangs = threading.Event()
    vlms = calls(lambda: hangs.wait() and None)
    await vlms.look(0.01)
    hangs.set()
    assert vlms.start_problem == STARTING


def test_the_cause_of_a_start_that_failed_is_its_last_exception() -> None:
    assert cause_of(TRACEBACK).startswith("core.errors.BaseModelError: Base 'tiny-vlm': model.safetensors is missing")
    assert cause_of("") == cause_of("Upscaling from 0 to 1 replicas.") == ""
    assert cause_of("It failed. Error:\nThe actor died unexpectedly before finishing this task.\n\n") == (
        "The actor died unexpectedly before finishing this task."
    )


def starting(problem: str = STARTING) -> AppState:
    return state_of(Models(), ScriptedVlms(start_problem=problem))


async def test_requests_to_a_vlm_that_starts_are_refused_at_once() -> None:
    question = {"image": "", "question": "what?", "model": "vlm"}
    async with client(starting()) as http:
        answers: list[httpx.Response] = [
            await http.post("/v1/chat/completions", json={"model": "vlm", "messages": about_image(), "stream": stream})
            for stream in (False, True)
        ]
        answers.append(await http.post("/v1/vqa", json=question))
    for answer in answers:
        assert STARTING in refusal(answer, 503, "vlm_starting")
        assert answer.headers["retry-after"] == "5"


async def test_a_vlm_that_starts_does_not_take_clip_away() -> None:
    problem = "the VLM is starting again, after it failed: MemoryError: no room"
    async with client(starting(problem)) as http:
        ready = {name: await http.get(f"/health/{name}") for name in ("ready", "ready/vlm", "live", "state")}
        models = [row["id"] for row in (await http.get("/v1/models")).json()["data"]]
    assert {name: answer.status_code for name, answer in ready.items()} == {
        "ready": 200, "ready/vlm": 503, "live": 200, "state": 503,
    }  # fmt: skip
    assert problem in refusal(ready["ready/vlm"], 503, "vlm_starting")
    assert problem in ready["state"].json()["parts"]["vlm"]["detail"]
    assert models and not any(name.startswith("vlm") for name in models)
    async with client(state_of(Models(), ScriptedVlms())) as http:
        assert "vlm" in [row["id"] for row in (await http.get("/v1/models")).json()["data"]]
