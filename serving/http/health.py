"""Health and metrics. All concurrent callers share one answer; probes run at most once a second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from core import metrics
from core.dependencies import Dependency, State, current
from serving.errors import QueueFull, VlmStarting
from serving.http.app_state import AppState, app_state, release_headers
from serving.http.bodies import ResponseBody
from serving.http.errors import RESPONSES, RETRY_AFTER_SECONDS, ApiError, ErrorBody, ErrorDetail, answer, described
from serving.http.recent import Recent
from serving.own_threads import OwnThreads

router = APIRouter(tags=["Health"])
TEXT = {"type": "string"}
REFUSED: dict[int | str, dict[str, Any]] = {"4XX": RESPONSES["4XX"]}
NOT_READY: dict[int | str, dict[str, Any]] = {
    **REFUSED,
    404: {"model": ErrorBody, "description": "No such model is served here."},
    503: {"model": ErrorBody, "description": "It does not answer; the message has the reason."},
}
log = logging.getLogger("ratchet.http")
Component = Literal["clip", "vlm", "catalog"]
PROBE_SECONDS = 10.0
WATCH_SECONDS = 10.0
"""Between updates of the metric of ready parts."""


class Alive(ResponseBody):
    """A forward pass of each model went through."""

    status: Literal["ok"]
    release: int
    seconds: float
    """Of the slowest."""


class Ready(ResponseBody):
    """The model answers."""

    status: Literal["ready"]
    release: int
    dependencies: dict[Dependency, State]
    """The state of those that serving has used, as it found them last."""


class PartHealth(ResponseBody):
    """State of a part."""

    ready: bool
    detail: str


class HealthState(ResponseBody):
    """Every part is ready."""

    status: Literal["ok"]
    parts: dict[Component, PartHealth]
    dependencies: dict[Dependency, State]


class DegradedState(ResponseBody):
    """A part is not ready."""

    status: Literal["degraded"]
    parts: dict[Literal["clip", "vlm", "catalog"], PartHealth]
    dependencies: dict[Dependency, State]
    error: ErrorDetail


@router.get(
    "/health/live", summary="Liveness: runs a forward pass of every model", response_model=Alive, responses=NOT_READY
)
async def live(request: Request) -> JSONResponse:
    """200 when a text went through an encoder and a VLM under the live release; 503 otherwise. A VLM that answers
    other requests, and makes progress, is alive. One that has not come up yet does not count: what it waits for, a
    restart of this node would only begin again.
    """
    probes = _probes(request)
    states = {name: await probes.part(name) for name in probes.parts() if name != "catalog"}
    for name, state in states.items():
        if not state.ready and not state.starting:
            return answer(ApiError(503, f"{name}: {state.detail}", code="not_ready"))
    seconds = max(state.seconds for state in states.values())
    return _ok(request, {"status": "ok", "release": states["clip"].release, "seconds": round(seconds, 4)})


@router.get("/health", include_in_schema=False)
@router.get("/health/ready", summary="Readiness", response_model=Ready, responses=NOT_READY)
async def ready(
    request: Request, model: Annotated[Component, Query(description="The model; default: CLIP.")] = "clip"
) -> JSONResponse:
    """200 when a release is live and a text went through an encoder. The VLM and the catalog do not count: while one of
    them restarts, the others answer. Neither do full queues, the ledger, or the stores. A server that shuts down is
    not ready.
    """
    return await ready_model(request, model)


@router.get("/health/ready/{model}", summary="Readiness of a model", response_model=Ready, responses=NOT_READY)
async def ready_model(request: Request, model: Component) -> JSONResponse:
    """`clip`, `vlm` or `catalog`; 404 where no VLM is served."""
    probes = _probes(request)
    if model not in probes.parts():
        return answer(ApiError(404, f"no {model} is served here.", param="model", code="no_vlm"))
    if app_state(request).admission.closed:
        return answer(ApiError(503, "the server is ending.", code="not_ready"))
    state = await probes.part(model)
    if not state.ready:
        seconds = VlmStarting.retry_after if state.starting else RETRY_AFTER_SECONDS
        return answer(ApiError(503, state.detail, code=state.code, headers={"Retry-After": str(seconds)}))
    return _ok(request, {"status": "ready", "release": state.release, "dependencies": probes.dependencies()})


@router.get(
    "/health/state",
    summary="Status of every part",
    response_model=HealthState,
    responses={**REFUSED, 503: {"model": DegradedState, "description": "A part is not ready."}},
)
async def whole(request: Request) -> JSONResponse:
    """For alerts, not for routing: 200 when every part is ready, 503 when one is not. Dependencies do not count."""
    probes = _probes(request)
    names = probes.parts()
    states = dict(zip(names, await asyncio.gather(*map(probes.part, names)), strict=True))
    parts = {name: {"ready": state.ready, "detail": state.detail} for name, state in states.items()}
    details = {"parts": parts, "dependencies": probes.dependencies()}
    away = [name for name, state in states.items() if not state.ready]
    if not away:
        return JSONResponse({"status": "ok", **details})
    error = described(ApiError(503, f"not ready: {', '.join(away)}.", code="not_ready"))
    return JSONResponse({"status": "degraded", **details, **error.content}, 503)


@router.get("/version", include_in_schema=False)
async def version() -> JSONResponse:
    return JSONResponse({"version": metrics.build.number()})


def _ok(request: Request, body: dict[str, Any]) -> JSONResponse:
    live = app_state(request).admission.live
    return JSONResponse(body, headers=release_headers(live) if live else None)


def _probes(request: Request) -> Probes:
    probes: Probes = request.app.state.probes
    return probes


@router.get(
    "/metrics",
    summary="Prometheus metrics of all serving processes",
    response_model=None,
    response_class=Response,
    responses={
        **REFUSED,
        200: {"description": "Prometheus' text format.", "content": {CONTENT_TYPE_LATEST: {"schema": TEXT}}},
    },
)
async def prometheus(request: Request) -> Response:
    """Text format."""
    return Response(await _probes(request).metrics_page.get(), media_type=CONTENT_TYPE_LATEST)


@dataclass(frozen=True, slots=True)
class ComponentState:
    """State of a part at its last probe."""

    ready: bool
    detail: str = "ok"
    """Reason that it is not ready, or that it is busy."""
    release: int = 0
    seconds: float = 0.0
    code: str = "not_ready"
    """Error code if it is not ready."""

    @property
    def starting(self) -> bool:
        """True until this part has come up for the first time: a restart of the process would not help."""
        return not self.ready and self.code == VlmStarting.code


class Probes:
    """State of each part. A full queue or a busy VLM is not an outage: the part answers others' requests."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._probe: dict[Component, Callable[[], Awaitable[ComponentState]]] = {
            "clip": partial(self._passed, "clip"), "vlm": partial(self._passed, "vlm"), "catalog": self._catalog,
        }  # fmt: skip
        self._of_catalog: dict[str, State] = {}
        self._recent = {name: Recent(probe) for name, probe in self._probe.items()}
        thread = OwnThreads("metrics")
        self.metrics_page = Recent(lambda: thread.run(metrics.exposition, "serve"), seconds=0.0)
        """The metrics of all serving processes; concurrent callers share a page."""

    def parts(self) -> tuple[Component, ...]:
        return ("clip", "vlm", "catalog") if self._state.vlms is not None else ("clip", "catalog")

    async def part(self, name: Component) -> ComponentState:
        """State of one part, at most a second old."""
        return await self._recent[name].get()

    def dependencies(self) -> dict[str, State]:
        """Last noted state of the dependencies that this process and the catalog have used."""
        return {**self._of_catalog, **{name: found.state for name, found in current().items()}}

    async def watch(self) -> None:
        """Keep exporting which parts are ready. Probes separately, so that callers' answers do not get older."""
        while True:
            for name in self.parts():
                metrics.http.up(name, (await self._probe[name]()).ready)
            await asyncio.sleep(WATCH_SECONDS)

    async def _passed(self, name: Literal["clip", "vlm"]) -> ComponentState:
        state = self._state
        if state.admission.live is None:
            await state.refresh()
        snapshot = state.admission.live
        if snapshot is None:
            return ComponentState(False, "no release is live yet.")
        deadline = time.monotonic() + PROBE_SECONDS
        if name == "clip":
            rows = state.tokenizer.rows(["alive"])
            return await _observed(state.encoders.encode("text", rows, snapshot, deadline), snapshot.release)
        try:
            work = state.need_vlms().probe(snapshot, deadline)
        except VlmStarting as error:
            return ComponentState(False, error.message, snapshot.release, code=error.code)
        return await _observed(work, snapshot.release)

    async def _catalog(self) -> ComponentState:
        live = self._state.admission.live
        return await _observed(self._ask_catalog(), live.release if live else 0)

    async def _ask_catalog(self) -> None:
        self._of_catalog = (await self._state.index.status()).get("dependencies", {})


async def _observed(work: Awaitable[object], release: int) -> ComponentState:
    began = time.perf_counter()
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await work
    except QueueFull:
        return ComponentState(True, "busy", release, time.perf_counter() - began)
    except TimeoutError:
        return ComponentState(False, f"no answer within {PROBE_SECONDS:g} s.", release)
    except Exception as error:
        description = described(error)
        if description.code == "internal":
            log.error("a probe failed", exc_info=error)
        return ComponentState(False, description.message, release, time.perf_counter() - began)
    return ComponentState(True, "ok", release, time.perf_counter() - began)
