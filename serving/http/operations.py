"""The list of releases, and the operators' calls under /admin/v1."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, Field, model_validator

from core.ledger.rows import Family, ProposalKind, ReleaseRow, Scope
from serving.http.app_state import AppState, app_state
from serving.http.auth import operator
from serving.http.bodies import Body, Reason, ResponseBody, json_body, json_response, json_schema
from serving.http.errors import ErrorBody, field_error
from serving.own_threads import OwnThreads
from serving.releases.rollback import ledger_answers
from serving.releases.types import (
    BASE,
    Adapters,
    HoldCommand,
    LiveCommand,
    PromoteCommand,
    ReleaseCommand,
    ResumeCommand,
    RollbackCommand,
)

router = APIRouter(tags=["Operations"])
MAX_RELEASES = 500
SHOWN_RELEASES = 50
READ_SECONDS = 1.0
"""Longest wait for a new value if an older one is known."""
OPERATOR_THREADS = OwnThreads("operator", 4)
"""For reads of operator calls, which no other call can delay."""
CHANGES: dict[int | str, dict[str, Any]] = {
    409: {"model": ErrorBody, "description": "Another release went live meanwhile, or the ledger does not allow it."},
    422: {"model": ErrorBody, "description": "`release_failed`: a replica could not prepare it; what is live stays."},
}


class ReasonRequest(Body):
    """Reason, for the audit log."""

    reason: Reason


class PromoteRequest(ReasonRequest):
    """Promote the live canary or shadow to all requests."""

    expected_live: int | None = Field(None, ge=0, lt=2**63, description="Fail with 409 if another release is live.")


class ReleaseRequest(PromoteRequest):
    """Release adapters from the ledger. A family that is not named keeps its live adapter; null: the base alone."""

    clip: str | None = Field(None, max_length=200, description="CLIP adapter; null or `base`: the base alone.")
    vlm: str | None = Field(None, max_length=200, description="VLM adapter; null or `base`: the base alone.")
    share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Of the requests: 1 all, 0.1 a canary for a tenth, 0 a shadow that answers no client.",
    )
    force: bool = Field(False, description="Allow adapters that passed no gate and were never live.")

    @model_validator(mode="after")
    def names_one(self) -> ReleaseRequest:
        if not self.model_fields_set & {"clip", "vlm"}:
            raise ValueError("name `clip`, `vlm`, or both")
        return self

    def adapters(self) -> Adapters:
        named: Adapters = {"clip": self.clip, "vlm": self.vlm}
        return {f: None if name == BASE else name for f, name in named.items() if f in self.model_fields_set}


class RollbackRequest(PromoteRequest):
    """Go back: to the newest release with another adapter, or to release `to`; one family's adapter, or both."""

    to: int | None = Field(None, ge=1, lt=2**63, description="Release to go back to; default: the previous one.")
    family: Family | None = Field(None, description="`clip` or `vlm`: roll back only this one.")


class ReleaseBody(ResponseBody):
    """A row of the ledger's list of releases."""

    number: int
    clip: str | None
    """CLIP adapter; null: the base alone."""
    vlm: str | None
    """VLM adapter; null: the base alone."""
    actor: str
    reason: str
    proposal_id: int | None
    created_at: datetime
    share: float
    """Of the requests that it answers while it is live: 1 all, 0 none (a shadow), between them a canary."""
    clip_base: str | None
    """Digest of the base of `clip`; null as long as no other base was ever live."""
    live: bool
    resident: bool
    """True if requests may name it (`clip@number`, `vlm@number`)."""
    image_space: str | None
    """Digest of its image embedding space; null where it is not resident."""
    text_space: str | None
    """Digest of its text embedding space; null where it is not resident."""


class ReleaseList(ResponseBody):
    """Releases, newest first."""

    object: Literal["list"]
    live: int | None
    """Null before the first release."""
    stable: int | None
    """The newest release that answers all requests, or those that a canary does not."""
    data: list[ReleaseBody]


class ReleaseOutcome(ResponseBody):
    """The new live release, and timings."""

    object: Literal["release"]
    number: int
    clip: str | None
    """CLIP adapter; null: the base alone."""
    vlm: str | None
    """VLM adapter; null: the base alone."""
    kind: ProposalKind
    family: Scope
    """Which adapters changed."""
    proposal: int | None
    prepare_seconds: float
    """Until every replica had loaded and checked it."""
    commit_seconds: float
    """From the ledger's commit until the replicas had been told."""
    acknowledged: int
    """Replicas that confirmed."""
    share: float
    """Of the requests that it answers."""


class HoldState(ResponseBody):
    """True if updates are on hold."""

    held: bool


class Hold(ResponseBody):
    """Actor and reason of the hold."""

    actor: str
    reason: str


class ResidentRelease(ResponseBody):
    """A release that requests may name."""

    release: int
    adapter: str
    """CLIP adapter; `base`: the base alone."""
    image_space: str
    text_space: str
    vlm: str
    """VLM adapter; `base`: the base alone."""
    share: float


class ControllerStatus(ResponseBody):
    """The release controller, at this moment."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)
    started: bool
    """True if every replica has prepared the live release since this controller started."""
    epoch: int | None
    """Of its lease; null: another controller leads."""
    held: Hold | None
    resident: list[ResidentRelease]
    """Newest first."""
    rollout: dict[str, Any]
    """Last measurement of the guard of canaries and shadows; `state` is always there."""
    waits_for: list[str]
    """Indexes outside that the release which is being prepared waits for, each with its progress."""
    replicas: dict[str, dict[str, int]]
    """Replicas by deployment and by the state that Ray Serve gives them."""
    vlm: list[dict[str, Any]]
    """Each VLM replica: engine, base, resident adapters, running and waiting requests."""
    in_flight: dict[str, int]
    """Requests being answered by number of the release."""


class SpaceStatus(ResponseBody):
    """One image embedding space of the catalog."""

    rows: int
    """Samples embedded in it."""
    coverage: float
    """From 0 to 1."""
    missing: int
    rows_per_second: float
    """Of the backfill; 0 when it is complete."""
    seconds_left: float | None
    """Of the backfill; null: not known yet."""
    index: dict[str, Any]
    """Its index: `rows`, `coding`, `bytes`, `recall` (from 0 to 1), whether it is `used`."""


class CatalogStatus(ResponseBody):
    """The search catalog, at this moment."""

    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)
    corpus_rows: int
    coverage: float
    """The lowest of all spaces, from 0 to 1."""
    spaces: dict[str, SpaceStatus]
    """By digest."""
    searchable_seconds: float | None
    """From ingest until a sample could be found, of the last ones."""


class StatusBody(ResponseBody):
    """Release controller and catalog."""

    controller: ControllerStatus
    catalog: CatalogStatus
    vlm_problem: str
    """Why no VLM engine has started yet; empty: one has, or none is configured."""


@router.get("/v1/releases", summary="List releases", response_model=ReleaseList)
async def releases(request: Request, limit: Annotated[int, Query(ge=1, le=MAX_RELEASES)] = SHOWN_RELEASES) -> Response:
    """Newest first, with actor and reason. A `resident` one can be addressed as `clip@number` and `vlm@number`.

    While the `live` one is a canary or a shadow it answers its `share` of the requests, the `stable` one the others.
    While the ledger does not answer, these are the releases that it named last.
    """
    state = app_state(request)
    rows: list[ReleaseRow] = await request.app.state.releases.get(limit)
    live, stable = state.admission.live, state.admission.stable
    resident = {snapshot.release: snapshot for snapshot in state.admission.window}
    data = [
        {
            **asdict(row), "live": bool(live and row.number == live.release), "resident": row.number in resident,
            "image_space": resident[row.number].image_space if row.number in resident else None,
            "text_space": resident[row.number].text_space if row.number in resident else None,
        }
        for row in rows
    ]  # fmt: skip
    numbers = {"live": live.release if live else None, "stable": stable.release if stable else None}
    return json_response({"object": "list", **numbers, "data": data})


@router.post(
    "/admin/v1/releases",
    summary="Release adapters",
    response_model=ReleaseOutcome,
    responses=CHANGES,
    openapi_extra=json_schema(ReleaseRequest),
)
async def release(request: Request) -> JSONResponse:
    """Prepares it on every replica, with the catalog for a CLIP, and returns when all replicas serve it."""
    actor, live = await _operator_and_live(request)
    body = await json_body(request, ReleaseRequest)
    adapters = body.adapters()
    if "vlm" in adapters:
        _needs_vlm(app_state(request), "vlm")
    given = _decision(body, actor, live)
    return await _changed(request, ReleaseCommand(adapters=adapters, share=body.share, force=body.force, **given))


@router.post(
    "/admin/v1/promote",
    summary="Promote a canary or a shadow to all requests",
    response_model=ReleaseOutcome,
    responses=CHANGES,
    openapi_extra=json_schema(PromoteRequest),
)
async def promote(request: Request) -> JSONResponse:
    """Makes the live canary or shadow a full release."""
    actor, live = await _operator_and_live(request)
    body = await json_body(request, PromoteRequest)
    return await _changed(request, PromoteCommand(**_decision(body, actor, live)))


@router.post(
    "/admin/v1/rollback",
    summary="Roll a release back",
    response_model=ReleaseOutcome,
    responses=CHANGES,
    openapi_extra=json_schema(RollbackRequest),
)
async def rollback(request: Request) -> JSONResponse:
    """Creates a new release with the adapters of an older one; takes less than a second if they are resident."""
    async with ledger_answers():
        actor, live = await _operator_and_live(request)
    body = await json_body(request, RollbackRequest)
    if body.family == "vlm":
        _needs_vlm(app_state(request), "family")
    return await _changed(request, RollbackCommand(to=body.to, family=body.family, **_decision(body, actor, live)))


@router.post(
    "/admin/v1/hold", summary="Hold updates", response_model=HoldState, openapi_extra=json_schema(ReasonRequest)
)
async def hold(request: Request) -> JSONResponse:
    """Update proposals stay pending until `resume`. Operators can still release and roll back."""
    return await _held(request, HoldCommand)


@router.post(
    "/admin/v1/resume", summary="Resume updates", response_model=HoldState, openapi_extra=json_schema(ReasonRequest)
)
async def resume(request: Request) -> JSONResponse:
    """Waiting update proposals are released in their order."""
    return await _held(request, ResumeCommand)


@router.get("/admin/v1/status", summary="Status of controller and catalog", response_model=StatusBody)
async def status(request: Request) -> JSONResponse:
    """Resident releases, requests in flight, replicas, engine and precision of encoders and VLMs (and why no VLM has
    started yet), coverage of the catalog, what is on hold.
    """
    state = app_state(request)
    operator(request)
    controller, catalog = await asyncio.gather(state.operations.status(), state.index.status())
    problem = "" if state.vlms is None else state.vlms.start_problem
    return JSONResponse({"controller": controller, "catalog": catalog, "vlm_problem": problem})


def _needs_vlm(state: AppState, param: str) -> None:
    if state.vlms is None:
        raise field_error(param, "no vision-language model is served here.", "no_vlm")


async def _operator_and_live(request: Request) -> tuple[str, int]:
    """The caller, and the release that was live when the call arrived: a newer one by the commit is a conflict."""
    actor = operator(request)
    row = await OPERATOR_THREADS.run(app_state(request).ledger.live)
    return actor, row.number if row else 0


def _decision(body: PromoteRequest, actor: str, live: int) -> dict[str, Any]:
    expected = live if body.expected_live is None else body.expected_live
    return {"actor": actor, "reason": body.reason, "expected_live": expected}


async def _held(request: Request, command: type[HoldCommand | ResumeCommand]) -> JSONResponse:
    actor = operator(request)
    body = await json_body(request, ReasonRequest)
    await app_state(request).operations.hold(command(actor=actor, reason=body.reason))
    return JSONResponse({"held": command is HoldCommand})


async def _changed(request: Request, command: LiveCommand) -> JSONResponse:
    outcome = await app_state(request).operations.change(command)
    return JSONResponse({"object": "release", **asdict(outcome)})


class LastReleases:
    """The newest releases, by one reading at a time; while the ledger does not answer, those that it named last.
    ``read``: returns the given number, newest first; blocks, may raise."""

    def __init__(self, read: Callable[[int], list[ReleaseRow]]) -> None:
        self._read = read
        self._thread = OwnThreads("releases")
        self._known: list[ReleaseRow] | None = None

    async def get(self, limit: int) -> list[ReleaseRow]:
        """The newest releases; possibly fewer than ``limit`` while the ledger does not answer. Raises what the reading
        raised if none is known."""
        try:
            async with asyncio.timeout(None if self._known is None else READ_SECONDS):
                self._known = await self._thread.run(self._read, max(limit, SHOWN_RELEASES))
        except Exception:
            if self._known is None:
                raise
        return self._known[:limit]
