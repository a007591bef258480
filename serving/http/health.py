"""Health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ops import metrics
from serving.engines.vlm.generation import PROBE
from serving.http.app_state import AppState, app_state, release_headers
from serving.http.errors import answer
from serving.releases.release_snapshot import ReleaseSnapshot

router = APIRouter(tags=["Health"])
PROBE_SECONDS = 10.0


@router.get("/health/live", summary="Runs a forward pass of every model")
async def live(request: Request) -> JSONResponse:
    """200 when a text went through an encoder and a VLM under the live release; 503 otherwise."""
    state = app_state(request)
    began = time.perf_counter()
    with state.admission.admit() as snapshot:
        await asyncio.gather(*_passes(state, snapshot))
        return JSONResponse(
            {"status": "ok", "release": snapshot.release, "seconds": round(time.perf_counter() - began, 4)},
            headers=release_headers(snapshot),
        )


@router.get("/health/ready", summary="Whether requests may be sent")
async def ready(request: Request) -> JSONResponse:
    """200 when a release is live, its adapters are resident and the catalog answers; 503 otherwise."""
    state = app_state(request)
    if state.admission.live is None:
        await state.refresh()
    snapshot = state.admission.live
    if snapshot is None:
        return answer(503, "no release is live yet.", code="not_ready")
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await asyncio.gather(*_passes(state, snapshot), state.index.status())
    except TimeoutError:
        return answer(503, "the models or the catalog do not answer.", code="not_ready")
    return JSONResponse({"status": "ready", "release": snapshot.release}, headers=release_headers(snapshot))


def _passes(state: AppState, snapshot: ReleaseSnapshot) -> list[Coroutine[Any, Any, Any]]:
    """One forward pass of each model; a failure is answered as that of any request."""
    deadline = time.time() + PROBE_SECONDS
    passes: list[Coroutine[Any, Any, Any]] = [state.encoders.encode("text", ["alive"], snapshot, deadline)]
    if state.vlms is not None:
        passes.append(state.vlms.reply(PROBE, snapshot, deadline))
    return passes


@router.get("/metrics", summary="Prometheus metrics of all serving processes", response_class=Response)
async def prometheus() -> Response:
    """Text format."""
    return Response(await asyncio.to_thread(metrics.exposition, "serve"), media_type=CONTENT_TYPE_LATEST)
