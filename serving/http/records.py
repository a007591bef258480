"""Receipts: what became of a record that somebody sent."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse

from core.errors import RecordError
from serving.http.app_state import app_state
from serving.http.auth import operator
from serving.http.errors import ApiError, from_record, missing
from serving.http.response_schemas import ResponseBody
from streams.store.sample_queries import RecordOutcome

router = APIRouter(tags=["Records"])
Topic = Annotated[str, Path(max_length=260, pattern="^[^:]+$", description="As the delivery report names it.")]
Partition = Annotated[int, Path(ge=0, lt=2**31)]
Offset = Annotated[int, Path(ge=0, lt=2**63 - 1)]
SampleId = Annotated[
    str, Query(min_length=8, max_length=64, description="A sample's id, or its first 8 digits or more.")
]


class ReceiptBody(ResponseBody):
    """What became of one record. What has no value is left out."""

    position: str
    """`topic:partition:offset`"""
    stream: str
    """The topic, with its generation if it was made anew (`topic@1`)."""
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
    summary="What became of a record, by its position",
    response_model=ReceiptList,
    responses=missing("`not_read_yet`: ingest has not come so far."),
)
async def record(request: Request, topic: Topic, partition: Partition, offset: Offset) -> JSONResponse:
    """Stored, a duplicate of which sample, refused and why, deleted, or lost. Needs the scope `publish` or `operate`.

    There is more than one receipt where more happened: a sample that was deleted since, a topic that was made anew.
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
    summary="What became of the records of a sample, by its id",
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
