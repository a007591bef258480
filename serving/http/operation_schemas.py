"""Bodies of answers about releases, operation, the quarantine and health; see :mod:`serving.http.response_schemas`."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import ConfigDict

from core.dependencies import Dependency, State
from core.ledger.rows import ProposalKind, ResubmissionState, Scope
from serving.http.errors import ErrorDetail
from serving.http.response_schemas import ResponseBody


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
    """Whether requests may name it (`clip@number`, `vlm@number`)."""
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
    """A release that is live now, and what it took."""

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
    """Whether proposals of the updater wait."""

    held: bool


class Hold(ResponseBody):
    """Who holds updates back, and why."""

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
    """Whether the live release has been prepared on every replica since this controller started."""
    epoch: int | None
    """Of its lease; null: another controller leads."""
    held: Hold | None
    resident: list[ResidentRelease]
    """Newest first."""
    rollout: dict[str, Any]
    """What the guard of canaries and shadows saw at its last look; `state` is always there."""
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
