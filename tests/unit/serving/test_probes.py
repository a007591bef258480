"""What a server says of itself: probes, its models, and what is told while the VLM starts or the ledger is away."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from core import dependencies
from core.errors import LedgerUnavailable
from core.metrics import declared
from serving.errors import QueueFull, Unavailable
from serving.http import health, operations
from serving.http.app_state import AppState
from serving.http.operations import LastReleases
from serving.releases.admission import Admission
from tests.support.waiting import until
from tests.unit.serving.auth_app import OPERATOR, AuthApp, Keys, refusal
from tests.unit.serving.scripted_vlms import ScriptedVlms, about_image, app_state, client


@dataclass
class Models:
    """Encoders and a catalog that fail as told and count calls, and a tokenizer."""

    clip: Exception | None = None
    catalog: Exception | None = None
    passes: int = 0
    dependencies: dict[str, str] = field(default_factory=dict)

    async def encode(self, *_: Any) -> None:
        self.passes += 1
        await asyncio.sleep(0)
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
FULL = QueueFull("the queue is full.")
STARTING = "the VLM is starting again, after it failed: MemoryError: no room"


@pytest.mark.parametrize(
    ("models", "vlms", "others"),
    [
        (Models(), ScriptedVlms(), {}),
        (Models(clip=FULL), ScriptedVlms(failure=FULL), {}),  # is no outage
        (Models(), None, {"ready/vlm": 404, "ready?model=vlm": 404}),
        (Models(), ScriptedVlms(failure=DEAD), dict.fromkeys(["ready/vlm", "ready?model=vlm", "live", "state"], 503)),
        (Models(catalog=DEAD), ScriptedVlms(), {"state": 503}),
        (Models(clip=DEAD), ScriptedVlms(), dict.fromkeys(["ready", "ready/clip", "live", "state"], 503)),
        (Models(), ScriptedVlms(start_problem=STARTING), dict.fromkeys(["ready/vlm", "ready?model=vlm", "state"], 503)),
    ],
    ids=["all", "full", "no VLM", "VLM away", "catalog away", "CLIP away", "VLM starting"],
)
async def test_each_probe_says_whether_what_it_is_about_answers(
    models: Models, vlms: ScriptedVlms | None, others: dict[str, int]
) -> None:
    names = ("ready", "ready/clip", "ready/vlm", "ready?model=vlm", "live", "state")
    async with client(state_of(models, vlms)) as http:
        answers = {name: await http.get(f"/health/{name}") for name in names}
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(names, 200) | others
    if answers["live"].status_code == 200:
        assert answers["live"].headers["x-ratchet-release"] == str(answers["live"].json()["release"]) == "3"


async def test_a_part_that_does_not_answer_is_named_with_the_reason() -> None:
    async with client(state_of(Models(clip=DEAD, catalog=DEAD), ScriptedVlms(failure=FULL))) as http:
        assert "no replica answered" in refusal(await http.get("/health/ready"), 503, "not_ready")
        state = await http.get("/health/state")
    assert refusal(state, 503, "not_ready") == "not ready: clip, catalog."
    assert state.json()["parts"]["vlm"] == {"ready": True, "detail": "busy"}


async def test_requests_to_a_vlm_that_starts_are_refused_at_once_with_the_reason_and_it_is_not_listed() -> None:
    question = {"image": "", "question": "what?", "model": "vlm"}
    chat = {"model": "vlm", "messages": about_image()}
    async with client(state_of(Models(), ScriptedVlms(start_problem=STARTING))) as http:
        answers = [await http.post("/v1/chat/completions", json={**chat, "stream": stream}) for stream in (False, True)]
        answers += [await http.post("/v1/vqa", json=question), await http.get("/health/ready/vlm")]
        state = (await http.get("/health/state")).json()
        models = [row["id"] for row in (await http.get("/v1/models")).json()["data"]]
    for answer in answers:
        assert STARTING in refusal(answer, 503, "vlm_starting")
        assert answer.headers["retry-after"] == "5"
    assert STARTING in state["parts"]["vlm"]["detail"]
    assert models and not any(name.startswith("vlm") for name in models)


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
        state.admission.closed = True
        for name in ("ready", "ready/clip", "ready/vlm", "ready/catalog"):
            answer = await http.get(f"/health/{name}")
            assert refusal(answer, 503, "not_ready") == "the server is ending."
            assert answer.headers["retry-after"]
        assert (await http.get("/health/live")).status_code == 200


async def test_before_a_release_is_live_nothing_is_ready() -> None:
    async def nothing() -> None:
        return

    state = replace(state_of(Models()), admission=Admission(), refresh=nothing)
    async with client(state) as http:
        assert "no release is live" in refusal(await http.get("/health/ready"), 503, "not_ready")


async def test_a_flood_of_probes_costs_one_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], perf_counter=lambda: now[0])
    monkeypatch.setattr(health, "time", clock)
    models = Models()
    async with client(state_of(models)) as http:
        leaving, *staying = [asyncio.create_task(http.get("/health/ready")) for _ in range(200)]
        await until(lambda: models.passes)
        leaving.cancel()
        assert {answer.status_code for answer in await asyncio.gather(*staying)} == {200}
        assert models.passes == 1
        now[0] = health.FRESH_SECONDS
        await http.get("/health/ready")
        assert models.passes == 2, "computed again when it is old"


async def test_what_answers_is_exported_though_nobody_asks() -> None:
    models = Models(catalog=DEAD)
    watching = asyncio.create_task(health.Probes(state_of(models, ScriptedVlms(failure=DEAD))).watch())

    def exported() -> dict[str, float]:
        samples = declared.SERVING_UP.collect()[0].samples
        return {sample.labels["part"]: sample.value for sample in samples}

    await until(lambda: exported() == {"clip": 1.0, "vlm": 0.0, "catalog": 0.0})
    watching.cancel()


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


class GrowingLedger:
    """Has one more release at each read. Waits while ``go`` is not set."""

    def __init__(self) -> None:
        self.newest = 0
        self.inside = 0
        self.away = False
        self.go = threading.Event()
        self.go.set()

    def read(self, limit: int) -> list[Any]:
        self.inside += 1
        assert self.go.wait(60)
        self.inside -= 1
        if self.away:
            raise LedgerUnavailable("away.")
        self.newest += 1
        return [SimpleNamespace(number=number) for number in range(self.newest, 0, -1)][:limit]


async def numbers(releases: LastReleases, limit: int = 1) -> list[int]:
    return [row.number for row in await releases.get(limit)]


async def test_releases_are_as_new_as_the_ledger_or_the_last_ones_known(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = GrowingLedger()
    releases = LastReleases(ledger.read)
    assert [await numbers(releases), await numbers(releases, 2)] == [[1], [2, 1]]
    monkeypatch.setattr(operations, "READ_SECONDS", 0.05)
    ledger.go.clear()
    try:
        assert await asyncio.gather(*(numbers(releases, 5) for _ in range(50))) == [[2, 1]] * 50
        assert ledger.inside == 1, "no second reading begins"
    finally:
        ledger.go.set()


async def test_while_the_ledger_is_away_the_last_ones_are_told_and_without_one_why() -> None:
    ledger = GrowingLedger()
    releases = LastReleases(ledger.read)
    ledger.away = True
    with pytest.raises(LedgerUnavailable):
        await numbers(releases)
    ledger.away = False
    assert await numbers(releases) == [1]
    ledger.away = True
    assert await numbers(releases) == [1]
