"""Refused records: what they are and why, and sending one again."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from ops.errors import RecordError
from serving.http.auth import operator
from serving.http.errors import ApiError, from_record
from serving.http.gateway import gateway, json_body, json_schema
from serving.http.schemas import ResubmitRequest
from streams.records import REASONS

router = APIRouter(tags=["Quarantine"])
MAX_ROWS = 500


@router.get("/admin/v1/quarantine", summary="Refused records, newest first")
async def quarantine(request: Request, limit: int = 50, reason: str | None = None) -> JSONResponse:
    """Each with its place, its reason and whether it was sent again. Needs the scope `publish` or `operate`."""
    operator(request, "publish", "operate")
    if not 1 <= limit <= MAX_ROWS:
        raise ApiError(400, f"limit must be 1 to {MAX_ROWS}.", param="limit", code="invalid_value")
    if reason is not None and reason not in REASONS:
        known = ", ".join(sorted(REASONS))
        raise ApiError(400, f"reason must be one of {known}.", param="reason", code="invalid_value")
    return JSONResponse({"object": "list", "data": await gateway(request).quarantine.newest(limit, reason)})


@router.post(
    "/admin/v1/quarantine/resubmit", summary="Send a refused record again", openapi_extra=json_schema(ResubmitRequest)
)
async def resubmit(request: Request) -> JSONResponse:
    """Sends the record as it came, once: again is 409 unless forced. Needs the scope `publish` or `operate`."""
    actor = operator(request, "publish", "operate")
    asked = await json_body(request, ResubmitRequest)
    try:
        sent = await gateway(request).quarantine.resubmit(
            asked.place, actor=actor, reason=asked.reason, force=asked.force
        )
    except RecordError as error:
        raise from_record(error, "place") from None
    return JSONResponse({"object": "resubmission", "place": asked.place, **sent})
