"""Probes: what they say of each model, and that a flood of them costs one forward pass a second."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field, replace
from typing import Any, cast

import httpx
import pytest

from core import dependencies
from core.errors import LedgerUnavailable
from core.metrics import declared
from serving.errors import QueueFull, Unavailable
from serving.http import health
from serving.http.app_state import AppState
from serving.http.health import Recent
from serving.releases.admission import Admission
from tests.support.waiting import until
from tests.unit.serving.auth_app import OPERATOR, AuthApp, Keys, refusal
from tests.unit.serving.scripted_vlms import ScriptedVlms, app_state, client


@dataclass
class Models:
    """Encoders and a catalog that fail as told, and count; and a tokenizer."""

    clip: Exception | None = None
    catalog: Exception | None = None
    passes: int = 0
    dependencies: dict[str, str] = field(default_factory=dict)

    async def encode(self, *_: Any) -> None:
        self.passes += 1
        if self.clip is not None:
            raise self.clip

    def rows(self, texts: list[str]) -> list[list[int]]:
        return [[1, 2] for _ in texts]

    async def status(self) -> dict[str, Any]:
        if self.catalog is not None:
            raise self.catalog
        return {"dependencies": self.dependencies}


def state_of(models: Models, vlms: ScriptedVlms | None = None) -> AppState:
    both = cast(Any, models)
    return replace(app_state(vlms), encoders=both, index=both, tokenizer=both)


DEAD = Unavailable("no replica answered.")


async def statuses(state: AppState) -> dict[str, int]:
    names = ("ready", "ready/clip", "ready/vlm", "ready?model=vlm", "live", "state")
    async with client(state) as http:
        return {name: (await http.get(f"/health/{name}")).status_code for name in names}


async def test_all_is_ready() -> None:
    assert set((await statuses(state_of(Models(), ScriptedVlms()))).values()) == {200}


async def test_a_vlm_that_restarts_does_not_take_clip_away() -> None:
    got = await statuses(state_of(Models(), ScriptedVlms(failure=DEAD)))
    assert got == {
        "ready": 200, "ready/clip": 200, "ready/vlm": 503, "ready?model=vlm": 503, "live": 503, "state": 503,
    }  # fmt: skip


async def test_a_catalog_that_is_away_is_seen_in_the_whole_state_only() -> None:
    got = await statuses(state_of(Models(catalog=DEAD), ScriptedVlms()))
    assert [name for name, status in got.items() if status != 200] == ["state"]
    async with client(state_of(Models(catalog=DEAD), ScriptedVlms())) as http:
        assert refusal(await http.get("/health/state"), 503, "not_ready") == "not ready: catalog."


async def test_health_names_the_state_of_each_dependency_and_stays_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dependencies, "_current", {})
    dependencies.noted(LedgerUnavailable("the ledger does not answer.", state="slow"))
    models = Models(dependencies={"store": "refused"})
    async with client(state_of(models)) as http:
        assert (await http.get("/health/ready")).json()["dependencies"] == {"ledger": "slow"}
        state = await http.get("/health/state")
        assert (state.status_code, state.json()["dependencies"]) == (200, {"ledger": "slow", "store": "refused"})
        ready = await http.get("/health/ready")
        assert (ready.status_code, ready.json()["dependencies"]) == (200, {"ledger": "slow", "store": "refused"})


async def test_a_server_that_drains_is_not_ready_and_is_alive() -> None:
    state = state_of(Models(), ScriptedVlms())
    async with client(state) as http:
        assert (await http.get("/health/ready")).status_code == 200
        state.admission.close()
        for name in ("ready", "ready/clip", "ready/vlm", "ready/catalog"):
            answer = await http.get(f"/health/{name}")
            assert refusal(answer, 503, "not_ready") == "the server is ending."
            assert answer.headers["retry-after"]
        assert (await http.get("/health/live")).status_code == 200


async def test_a_full_queue_is_no_outage() -> None:
    full = QueueFull("the queue is full.")
    state = state_of(Models(clip=full), ScriptedVlms(failure=full))
    assert set((await statuses(state)).values()) == {200}
    async with client(state) as http:
        assert (await http.get("/health/state")).json()["parts"]["vlm"] == {"ready": True, "detail": "busy"}


async def test_without_a_vlm_there_is_nothing_to_wait_for() -> None:
    got = await statuses(state_of(Models()))
    assert (got["ready"], got["live"], got["state"], got["ready/vlm"]) == (200, 200, 200, 404)


async def test_an_encoder_that_fails_is_not_ready_and_says_why() -> None:
    async with client(state_of(Models(clip=DEAD))) as http:
        assert "no replica answered" in refusal(await http.get("/health/ready"), 503, "not_ready")


async def test_before_a_release_is_live_nothing_is_ready() -> None:
    async def nothing() -> None:
        return

    state = replace(state_of(Models()), admission=Admission(), refresh=nothing)
    async with client(state) as http:
        assert "no release is live" in refusal(await http.get("/health/ready"), 503, "not_ready")


async def test_a_flood_of_probes_costs_one_forward_pass() -> None:
    models = Models()
    async with client(state_of(models)) as http:
        answers: list[httpx.Response] = await asyncio.gather(*(http.get("/health/ready") for _ in range(200)))
    assert {answer.status_code for answer in answers} == {200}
    assert models.passes == 1


async def test_a_value_is_computed_again_when_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(health.time, "monotonic", lambda: clock["now"])
    computed = iter(range(10))

    async def compute() -> int:
        return next(computed)

    recent = Recent(compute, seconds=1.0)
    assert [await recent.get(), await recent.get()] == [0, 0]
    clock["now"] = 1.0
    assert await recent.get() == 1


async def test_what_answers_is_exported_though_nobody_asks() -> None:
    models = Models(catalog=DEAD)
    watching = asyncio.create_task(health.Probes(state_of(models, ScriptedVlms(failure=DEAD))).watch())

    def exported() -> dict[str, float]:
        samples = declared.SERVING_UP.collect()[0].samples
        return {sample.labels["part"]: sample.value for sample in samples}

    await until(lambda: exported() == {"clip": 1.0, "vlm": 0.0, "catalog": 0.0})
    watching.cancel()


async def test_a_caller_that_leaves_does_not_end_the_probe_of_the_others() -> None:
    go = asyncio.Event()

    async def compute() -> str:
        await go.wait()
        return "ok"

    recent = Recent(compute)
    leaving, staying = asyncio.create_task(recent.get()), asyncio.create_task(recent.get())
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    go.set()
    assert await staying == "ok"


async def test_releases_are_503_while_the_ledger_is_away(closed: AuthApp, keys: Keys) -> None:
    def away(*_: Any) -> Any:
        raise LedgerUnavailable("the ledger does not answer.", "Try again.")

    closed.ledger = cast(Any, type("Away", (), {"releases": away, "api_keys": keys.ledger.api_keys}))
    app = AuthApp(cast(Any, closed.ledger), closed.settings.home)
    refusal(await app.get("/v1/releases", OPERATOR), 503, "ledger_unavailable")


async def test_a_rollback_is_refused_at_once_while_the_ledger_hangs(
    closed: AuthApp, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    hung = threading.Event()
    monkeypatch.setattr("serving.releases.rollback.ANSWER_SECONDS", 0.01)
    silent = cast(Any, type("Silent", (), {"live": lambda *_: hung.wait(30), "api_keys": keys.ledger.api_keys}))
    app = AuthApp(silent, closed.settings.home)
    try:
        answer = await app.send("POST", "/admin/v1/rollback", OPERATOR, json={"reason": "r"})
        refusal(answer, 503, "ledger_unavailable")
        assert not hung.is_set()
    finally:
        hung.set()
