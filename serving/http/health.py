"""Health and metrics. What they answer is computed for everybody at once, that of probes at most once a second."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from core.dependencies import Dependency, State
from serving.errors import VlmStarting
from serving.http import errors
from serving.http.app_state import app_state, release_headers
from serving.http.errors import ErrorBody, ErrorDetail, answer
from serving.http.probes import Component, ComponentState, Probes
from serving.http.response_schemas import ResponseBody

router = APIRouter(tags=["Health"])
TEXT = {"type": "string"}
REFUSED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused; `param` names the place."},
}
NOT_READY: dict[int | str, dict[str, Any]] = {
    **REFUSED,
    404: {"model": ErrorBody, "description": "No such model is served here."},
    503: {"model": ErrorBody, "description": "It does not answer; the message says why."},
}


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
    """Whether a part answers."""

    ready: bool
    detail: str


class HealthState(ResponseBody):
    """Every part is ready."""

    status: Literal["ok"]
    parts: dict[Literal["clip", "vlm", "catalog"], PartHealth]
    dependencies: dict[Dependency, State]


class DegradedState(ResponseBody):
    """A part is not ready."""

    status: Literal["degraded"]
    parts: dict[Literal["clip", "vlm", "catalog"], PartHealth]
    dependencies: dict[Dependency, State]
    error: ErrorDetail


@router.get("/health/live", summary="Runs a forward pass of every model", response_model=Alive, responses=NOT_READY)
async def live(request: Request) -> JSONResponse:
    """200 when a text went through an encoder and a VLM under the live release; 503 otherwise. A VLM that answers
    other requests, and makes progress, is alive. One that has not come up yet does not count: what it waits for, a
    restart of this node would only begin anew.
    """
    probes = _probes(request)
    states = {name: await probes.part(name) for name in probes.parts() if name != "catalog"}
    for name, state in states.items():
        if not state.ready and not state.starting:
            return answer(503, f"{name}: {state.detail}", code="not_ready")
    seconds = max(state.seconds for state in states.values())
    return _ok(request, {"status": "ok", "release": states["clip"].release, "seconds": round(seconds, 4)})


@router.get("/health/ready", summary="Whether this node answers requests", response_model=Ready, responses=NOT_READY)
async def ready(
    request: Request, model: Annotated[Component, Query(description="Which model; by default CLIP.")] = "clip"
) -> JSONResponse:
    """200 when a release is live and a text went through an encoder. The VLM and the catalog do not count: while one of
    them restarts, the others answer. A full queue is no outage, and what is in service needs no dependency. A server
    that is ending is not ready.
    """
    return await _ready(request, model)


@router.get(
    "/health/ready/{model}",
    summary="Whether this node answers requests to a model",
    response_model=Ready,
    responses=NOT_READY,
)
async def ready_model(request: Request, model: Component) -> JSONResponse:
    """`clip`, `vlm` or `catalog`; 404 where no VLM is served."""
    return await _ready(request, model)


@router.get(
    "/health/state",
    summary="Every part at a glance",
    response_model=HealthState,
    responses={**REFUSED, 503: {"model": DegradedState, "description": "A part is not ready."}},
)
async def whole(request: Request) -> JSONResponse:
    """For alerts, not for routing: 200 when every part is ready, 503 when one is not. Dependencies do not count."""
    probes = _probes(request)
    states = await probes.all()
    parts = {name: {"ready": state.ready, "detail": state.detail} for name, state in states.items()}
    details = {"parts": parts, "dependencies": probes.dependencies()}
    away = [name for name, state in states.items() if not state.ready]
    if not away:
        return JSONResponse({"status": "ok", **details})
    error = errors.body(503, f"not ready: {', '.join(away)}.", code="not_ready")
    return JSONResponse({"status": "degraded", **details, **error}, 503)


async def _ready(request: Request, model: Component) -> JSONResponse:
    probes = _probes(request)
    if model not in probes.parts():
        return answer(404, f"no {model} is served here.", "model", "no_vlm")
    if app_state(request).admission.closed:
        return answer(503, "the server is ending.", code="not_ready")
    state: ComponentState = await probes.part(model)
    if not state.ready:
        seconds = VlmStarting.retry_after if state.starting else errors.RETRY_AFTER_SECONDS
        return answer(503, state.detail, code=state.code, retry_after=seconds)
    return _ok(request, {"status": "ready", "release": state.release, "dependencies": probes.dependencies()})


def _ok(request: Request, body: dict[str, Any]) -> JSONResponse:
    live = app_state(request).admission.live
    return JSONResponse(body, headers=release_headers(live) if live else None)


def _probes(request: Request) -> Probes:
    return app_state(request).probes


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
    return Response(await app_state(request).metrics_page.get(), media_type=CONTENT_TYPE_LATEST)
