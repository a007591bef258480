"""Records: the outcome of one that was sent, quarantined records with their reasons, and resubmission."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field, field_validator, model_validator

from core.errors import RecordError
from core.ledger.rows import ResubmissionState
from ratchet_client.records import REASONS
from serving.http.app_state import app_state
from serving.http.auth import operator
from serving.http.bodies import Body, Reason, ResponseBody, in_range, json_body, json_response, json_schema
from serving.http.errors import ApiError, from_record, missing
from streams.store.sample_queries import RecordOutcome

router = APIRouter()
Topic = Annotated[str, Path(max_length=260, pattern="^[^:]+$", description="As the delivery report names it.")]
Partition = Annotated[int, Path(ge=0, lt=2**31)]
Offset = Annotated[int, Path(ge=0, lt=2**63 - 1)]
SampleId = Annotated[
    str, Query(min_length=8, max_length=64, description="A sample's id, or its first 8 digits or more.")
]
MAX_ROWS = 500


class ReceiptBody(ResponseBody):
    """Outcome of one record. Fields without a value are omitted."""

    position: str
    """`topic:partition:offset`"""
    stream: str
    """The topic, with its generation if it was created again (`topic@1`)."""
    partition: int
    offset: int
    outcome: RecordOutcome
    id: str | None = None
    """Of its sample."""
    duplicate_of: str | None = None
    """The sample that it repeats."""
    reason: str | None = None
    detail: str | None = None
    source: str | None = None
    split: str | None = None
    time: datetime | None = None
    """When this was decided."""


class ReceiptList(ResponseBody):
    """Receipts."""

    object: Literal["list"]
    data: list[ReceiptBody]


@router.get(
    "/v1/records/{topic}/{partition}/{offset}",
    tags=["Records"],
    summary="Receipt of a record, by position",
    response_model=ReceiptList,
    responses=missing("`not_read_yet`: ingest has not reached it."),
)
async def record(request: Request, topic: Topic, partition: Partition, offset: Offset) -> JSONResponse:
    """Stored, a duplicate of which sample, refused and why, deleted, or lost. Needs the scope `publish` or `operate`.

    There is more than one receipt where more happened: a sample that was deleted since, a topic that was created again.
    """
    operator(request, "publish", "operate")
    receipts = await app_state(request).receipts.of_position(topic, partition, offset)
    if receipts[0]["outcome"] == "not_read_yet":
        raise ApiError(
            404, f"record {topic}:{partition}:{offset} has not been read yet.", param="offset", code="not_read_yet"
        )
    return JSONResponse({"object": "list", "data": receipts})


@router.get(
    "/v1/records",
    tags=["Records"],
    summary="Receipts of a sample's records, by ID",
    response_model=ReceiptList,
    responses=missing("`record_not_found`: no record has this id; refused records have none."),
)
async def records(request: Request, id: SampleId) -> JSONResponse:
    """The record that was stored, and those that repeat it. Needs the scope `publish` or `operate`."""
    operator(request, "publish", "operate")
    try:
        receipts = await app_state(request).receipts.of_sample(id)
    except RecordError as error:
        raise from_record(error, "id") from None
    if not receipts:
        raise ApiError(404, f"no record has the id {id}.", param="id", code="record_not_found")
    return JSONResponse({"object": "list", "data": receipts})


class QuarantineSelection(Body):
    """Quarantined records to send, oldest first; without any field: all."""

    reason: str | None = Field(None, max_length=40, description="Filter by reason.")
    source: str | None = Field(None, max_length=256, description="Filter by source; empty: unknown.")
    since: datetime | None = Field(None, description="Quarantined at or after this time (UTC).")
    limit: int = Field(100, ge=1, le=500, description="At most so many, of those that were not sent again before.")

    _in_range = field_validator("since")(in_range)


class ResubmitRequest(Body):
    """A quarantined record to send again, or many, by a filter."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"place": "ratchet.samples:0:42", "reason": "the image is there now"},
                {"filter": {"reason": "uri_unreachable", "limit": 100}, "reason": "the image server is back"},
            ]
        }
    )
    place: str | None = Field(
        None, min_length=1, max_length=300, description="`topic:partition:offset`, as the list names it; or `filter`."
    )
    filter: QuarantineSelection | None = Field(None, description="Which records; or `place`.")
    reason: Reason
    force: bool = Field(False, description="With `place`: even if it was sent again before.")
    dry_run: bool = Field(False, description="With `filter`: count only.")

    @model_validator(mode="after")
    def names_one(self) -> ResubmitRequest:
        if (self.place is None) == (self.filter is None):
            raise ValueError("give `place` or `filter`")
        if (self.force and self.place is None) or (self.dry_run and self.filter is None):
            raise ValueError("`force` goes with `place`, `dry_run` with `filter`")
        return self


class ResubmissionBody(ResponseBody):
    """Last time that a quarantined record was sent again."""

    place: str
    state: ResubmissionState
    times: int
    actor: str
    reason: str
    updated_at: datetime


class QuarantinedRecordBody(ResponseBody):
    """A quarantined record, without its bytes."""

    place: str
    """`topic:partition:offset`"""
    reason: str
    """A code; see the guide for producers."""
    detail: str
    source: str
    """Source, from its headers; empty: unknown."""
    refused_at: datetime
    resubmission: ResubmissionBody | None


class QuarantineCounts(ResponseBody):
    """Quarantined records by count, highest first."""

    reason: dict[str, int]
    source: dict[str, int]


class QuarantineList(ResponseBody):
    """Quarantined records, newest first."""

    object: Literal["list"]
    data: list[QuarantinedRecordBody]
    counts: QuarantineCounts | None = None
    """Only with `counts=true`."""


class Resubmission(ResponseBody):
    """Where the topic has the record now."""

    object: Literal["resubmission"]
    place: str
    """Of the quarantined record."""
    topic: str
    partition: int
    offset: int


class ResubmissionReport(ResponseBody):
    """Outcome of the records that matched a filter."""

    object: Literal["resubmission.report"]
    dry_run: bool
    chosen: int
    """Matching records that were not sent again before."""
    sent: int
    before: int
    """Matching records that were sent again before."""
    empty: int
    """Records without a value, which cannot be sent."""
    failed: int
    """Records that the broker rejected; they may be tried again."""
    errors: list[str]
    """The first few reasons of these."""


@router.get(
    "/admin/v1/quarantine",
    tags=["Quarantine"],
    summary="Quarantined records, newest first",
    response_model=QuarantineList,
)
async def quarantine(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 50,
    reason: str | None = None,
    source: Annotated[str | None, Query(max_length=256, description="As their headers name it; empty: none.")] = None,
    counts: Annotated[bool, Query(description="Also count all of them by reason and by source.")] = False,
) -> Response:
    """Each with its place, its reason and whether it was sent again. Needs the scope `publish` or `operate`."""
    operator(request, "publish", "operate")
    _check_reason(reason, "reason")
    service = app_state(request).quarantine
    body: dict[str, Any] = {"object": "list", "data": await service.newest(limit, reason, source)}
    if counts:
        body["counts"] = await service.counts(reason, source)
    return json_response(body)


@router.post(
    "/admin/v1/quarantine/resubmit",
    tags=["Quarantine"],
    summary="Send quarantined records again",
    response_model=Resubmission | ResubmissionReport,
    openapi_extra=json_schema(ResubmitRequest),
)
async def resubmit(request: Request) -> JSONResponse:
    """Sends a record unchanged, once; a second time is 409 unless forced. Needs the scope `publish` or `operate`.

    With a `filter`, those that were not sent before are, and the answer counts them.
    """
    from streams.ingest.resubmit import QuarantineFilter

    actor = operator(request, "publish", "operate")
    body = await json_body(request, ResubmitRequest)
    state = app_state(request)
    if (chosen := body.filter) is not None:
        _check_reason(chosen.reason, "filter.reason")
        which = QuarantineFilter(chosen.reason, chosen.source, chosen.since, chosen.limit)
        report = await state.quarantine.resubmit_many(which, actor=actor, reason=body.reason, dry_run=body.dry_run)
        return JSONResponse({"object": "resubmission.report", **report})
    try:
        sent = await state.quarantine.resubmit(body.place or "", actor=actor, reason=body.reason, force=body.force)
    except RecordError as error:
        raise from_record(error, "place") from None
    return JSONResponse({"object": "resubmission", "place": body.place, **sent})


def _check_reason(reason: str | None, param: str) -> None:
    if reason is not None and reason not in REASONS:
        raise ApiError(400, f"{param} must be one of {', '.join(sorted(REASONS))}.", param=param, code="invalid_value")
