"""Health and metrics."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from ops import metrics
from serving.http.errors import answer
from serving.http.gateway import gateway, stamp_headers

router = APIRouter(tags=["Health"])
PROBE_SECONDS = 10.0


@router.get("/health/live", summary="Runs a forward pass")
async def live(request: Request) -> JSONResponse:
    """200 when a text went through an encoder under the live release; 503 otherwise."""
    at = gateway(request)
    began = time.perf_counter()
    with at.admission.admit() as stamp:
        await at.encoders.encode("text", ["alive"], stamp, time.time() + PROBE_SECONDS)
        return JSONResponse(
            {"status": "ok", "release": stamp.release, "seconds": round(time.perf_counter() - began, 4)},
            headers=stamp_headers(stamp),
        )


@router.get("/health/ready", summary="Whether requests may be sent")
async def ready(request: Request) -> JSONResponse:
    """200 when a release is live, its adapter is resident and the catalog answers; 503 otherwise."""
    at = gateway(request)
    if at.admission.live is None:
        await at.refresh()
    stamp = at.admission.live
    if stamp is None:
        return answer(503, "no release is live yet.", code="not_ready")
    try:
        async with asyncio.timeout(PROBE_SECONDS):
            await asyncio.gather(
                at.encoders.encode("text", ["ready"], stamp, time.time() + PROBE_SECONDS), at.index.status()
            )
    except TimeoutError:
        return answer(503, "the encoders or the catalog do not answer.", code="not_ready")
    return JSONResponse({"status": "ready", "release": stamp.release}, headers=stamp_headers(stamp))


@router.get("/metrics", summary="Prometheus metrics of all serving processes", response_class=Response)
async def prometheus() -> Response:
    """Text format."""
    return Response(await asyncio.to_thread(metrics.exposition), media_type=CONTENT_TYPE_LATEST)
