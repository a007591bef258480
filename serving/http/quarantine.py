"""Refused records: what they are and why, and sending them again, one or many."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse

from core.errors import RecordError
from core.ledger.rows import ResubmissionState
from ratchet_client.records import REASONS
from serving.http.app_state import AppState, app_state
from serving.http.auth import operator
from serving.http.errors import ApiError, from_record
from serving.http.json_bodies import json_body, json_schema
from serving.http.response_schemas import ResponseBody
from serving.http.schemas import RefusedSelection, ResubmitRequest

router = APIRouter(tags=["Quarantine"])
MAX_ROWS = 500


class ResubmissionBody(ResponseBody):
    """The last time that a refused record was sent again."""

    place: str
    state: ResubmissionState
    times: int
    actor: str
    reason: str
    updated_at: datetime


class RefusedRecordBody(ResponseBody):
    """A refused record, without its bytes."""

    place: str
    """`topic:partition:offset`"""
    reason: str
    """A code; see the guide for producers."""
    detail: str
    source: str
    """Who sent it, as its headers say; empty: they do not."""
    refused_at: datetime
    resubmission: ResubmissionBody | None


class QuarantineCounts(ResponseBody):
    """Refused records, the most frequent first."""

    reason: dict[str, int]
    source: dict[str, int]


class QuarantineList(ResponseBody):
    """Refused records, newest first."""

    object: Literal["list"]
    data: list[RefusedRecordBody]
    counts: QuarantineCounts | None = None
    """Only with `counts=true`."""


class Resubmission(ResponseBody):
    """Where the topic has the record now."""

    object: Literal["resubmission"]
    place: str
    """Of the refused record."""
    topic: str
    partition: int
    offset: int


class ResubmissionReport(ResponseBody):
    """What became of the records that a filter chose."""

    object: Literal["resubmission.report"]
    dry_run: bool
    chosen: int
    """They pass the filter, and were not sent again before."""
    sent: int
    before: int
    """They pass the filter, and were sent again before."""
    empty: int
    """They have no value: there is nothing to send."""
    failed: int
    """The broker did not take them; they may be tried again."""
    errors: list[str]
    """The first few reasons of these."""


@router.get("/admin/v1/quarantine", summary="Refused records, newest first", response_model=QuarantineList)
async def quarantine(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 50,
    reason: str | None = None,
    source: Annotated[str | None, Query(max_length=256, description="As their headers name it; empty: none.")] = None,
    counts: Annotated[bool, Query(description="Also count all of them by reason and by source.")] = False,
) -> JSONResponse:
    """Each with its place, its reason and whether it was sent again. Needs the scope `publish` or `operate`."""
    operator(request, "publish", "operate")
    _check_reason(reason, "reason")
    service = app_state(request).quarantine
    body: dict[str, Any] = {"object": "list", "data": await service.newest(limit, reason, source)}
    if counts:
        body["counts"] = await service.counts(reason, source)
    return JSONResponse(body)


@router.post(
    "/admin/v1/quarantine/resubmit",
    summary="Send refused records again",
    response_model=Resubmission | ResubmissionReport,
    openapi_extra=json_schema(ResubmitRequest),
)
async def resubmit(request: Request) -> JSONResponse:
    """Sends a record as it came, once: again is 409 unless forced. Needs the scope `publish` or `operate`.

    With a `filter`, those that were not sent before are, and the answer counts them.
    """
    actor = operator(request, "publish", "operate")
    body = await json_body(request, ResubmitRequest)
    state = app_state(request)
    if body.filter is not None:
        return await _resubmit_many(state, body.filter, actor, body)
    try:
        sent = await state.quarantine.resubmit(body.place or "", actor=actor, reason=body.reason, force=body.force)
    except RecordError as error:
        raise from_record(error, "place") from None
    return JSONResponse({"object": "resubmission", "place": body.place, **sent})


async def _resubmit_many(state: AppState, chosen: RefusedSelection, actor: str, body: ResubmitRequest) -> JSONResponse:
    from streams.ingest.resubmit import RefusalFilter

    _check_reason(chosen.reason, "filter.reason")
    which = RefusalFilter(chosen.reason, chosen.source, chosen.since, chosen.limit)
    report = await state.quarantine.resubmit_many(which, actor=actor, reason=body.reason, dry_run=body.dry_run)
    return JSONResponse({"object": "resubmission.report", **report})


def _check_reason(reason: str | None, param: str) -> None:
    if reason is not None and reason not in REASONS:
        raise ApiError(400, f"{param} must be one of {', '.join(sorted(REASONS))}.", param=param, code="invalid_value")
