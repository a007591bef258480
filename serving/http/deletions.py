"""Deletion of samples: requests and their progress."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, field_validator

from core.errors import SelectorError
from core.ledger import DeletionState
from serving.http.app_state import app_state
from serving.http.auth import operator
from serving.http.bodies import Body, Reason, ResponseBody, Source, in_range, json_body, json_schema
from serving.http.errors import ApiError, missing

router = APIRouter(tags=["Deletions"])
MAX_ROWS: Final = 500
DeletionId = Annotated[str, Path(max_length=300, json_schema_extra={"format": "deletion"})]


class SampleSelector(Body):
    """Conditions, all of which must hold. At least one other than `before` is required."""

    id: str | None = Field(None, min_length=1, max_length=64, description="A sample's id, 64 hex digits.")
    source: Source | None = Field(None, description="As set by the producer; also applies to quarantined records.")
    domain: Source | None = Field(None, description="As set by the producer.")
    concept: Source | None = Field(None, description="Concept, as set by the producer.")
    label: Source | None = Field(None, description="Label, as set by the producer.")
    key: str | None = Field(None, min_length=1, max_length=4096, description="The record's key, in hex.")
    record: str | None = Field(None, min_length=1, max_length=300, description="`topic:partition:offset`.")
    before: datetime | None = Field(None, description="Only what was ingested before this time, UTC.")

    _in_range = field_validator("before")(in_range)

    def fields(self) -> dict[str, str]:
        """The given fields, as :mod:`streams.store.deletion` takes them."""
        given = self.model_dump(exclude_none=True)
        return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in given.items()}


class DeletionRequest(Body):
    """Samples and quarantined records to delete."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"selector": {"source": "crawler-7"}, "reason": "consent withdrawn"}]}
    )
    selector: SampleSelector = Field(description="What is to be deleted.")
    reason: Reason
    dry_run: bool = Field(False, description="Count what is selected, and delete nothing.")


class LearnedFrom(ResponseBody):
    """Adapters that were trained on deleted samples."""

    learned: list[str]
    """Trained on some of the samples."""
    may_have_replayed: list[str]
    """Trained later, possibly with replay of the samples."""


class DeletionBody(ResponseBody):
    """A deletion, which is also its receipt."""

    object: Literal["deletion"]
    id: str
    state: DeletionState
    """`requested`; `removed`: no reader finds it any more; `held`: no file of the store has it, and the bucket keeps
    old versions of such files; `done`: no file has it any more."""
    selector: dict[str, str]
    actor: str
    reason: str
    samples: int
    refusals: int
    adapters: LearnedFrom
    first_update_without: str | None
    """The first update that was trained without it; null: none yet."""
    requested_at: datetime
    removed_at: datetime | None
    held_at: datetime | None
    done_at: datetime | None
    remains: str | None
    """Remains in the bucket, or why they are unknown; null: nothing."""
    remains_until: datetime | None
    """When object lock ends for what remains; null: not known, or nothing remains."""


class DeletionList(ResponseBody):
    """Deletions, newest first."""

    object: Literal["list"]
    data: list[DeletionBody]


class SelectionBody(ResponseBody):
    """Number of selected samples and records."""

    object: Literal["deletion.selection"]
    samples: int
    refusals: int


REQUESTED: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": SelectionBody, "description": "With `dry_run`: what is selected."},
    202: {"description": "It is requested; maintenance carries it out."},
}


@router.post(
    "/admin/v1/deletions",
    summary="Delete samples and quarantined records",
    status_code=202,
    response_model=DeletionBody,
    responses=REQUESTED,
    openapi_extra=json_schema(DeletionRequest),
)
async def request_deletion(request: Request) -> JSONResponse:
    """Of what was ingested before now. It leaves store, catalog, replay, quarantine and old versions."""
    actor = operator(request)
    wanted = await json_body(request, DeletionRequest)
    service = app_state(request).deletions
    try:
        if wanted.dry_run:
            selected = await service.selected(wanted.selector.fields())
            return JSONResponse({"object": "deletion.selection", **selected})
        receipt = await service.request(wanted.selector.fields(), actor=actor, reason=wanted.reason)
    except SelectorError as error:
        param = "selector" if error.field == "selector" else f"selector.{error.field}"
        raise ApiError(400, str(error), param=param, code="invalid_value") from None
    return JSONResponse({"object": "deletion", **receipt}, 202)


@router.get("/admin/v1/deletions", summary="Deletions, newest first", response_model=DeletionList)
async def deletions(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=MAX_ROWS)] = 50,
    state: Annotated[DeletionState | None, Query(description="Filter by state.")] = None,
) -> JSONResponse:
    """Progress of each, what it removed, and which adapters were trained on it."""
    operator(request)
    receipts = await app_state(request).deletions.newest(limit, state)
    return JSONResponse({"object": "list", "data": [{"object": "deletion", **each} for each in receipts]})


@router.get(
    "/admin/v1/deletions/{deletion_id}",
    summary="One deletion",
    response_model=DeletionBody,
    responses=missing("`deletion_not_found`: there is no such deletion."),
)
async def deletion(request: Request, deletion_id: DeletionId) -> JSONResponse:
    """Its receipt. Deletions by tombstones are named `tombstone topic:partition:offset`."""
    operator(request)
    receipt = await app_state(request).deletions.one(deletion_id)
    if receipt is None:
        raise ApiError(404, f"there is no deletion {deletion_id}.", param="deletion_id", code="deletion_not_found")
    return JSONResponse({"object": "deletion", **receipt})
