"""The ledger's tables (SQLAlchemy 2), whose rows queries return as detached copies. Times are UTC. Columns without an
annotation are not fields of a row. A test compares the tables with the migrations."""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, fields
from datetime import UTC, datetime
from inspect import get_annotations
from typing import Any, Final, Literal, get_args

from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema
from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Text,
    TypeDecorator,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from ratchet_client.models import Family as Family

Scope = Literal["clip", "vlm", "both"]
"""The adapters that a proposal sets; the other stays as it is live at commit."""
GateOutcome = Literal["passed", "rejected", "inconclusive"]
UpdateState = Literal["training", "trained", "gated", "done", "failed", "abandoned"]
ProposalKind = Literal["initial", "update", "rollback", "release", "promotion"]
ProposalState = Literal["pending", "preparing", "committed", "failed"]
KeyScope = Literal["infer", "search", "feedback", "publish", "operate"]
"""Rights of a key: query the models; read the corpus; report answers; resubmit quarantined records; release, roll back,
hold and resume."""
EventType = Literal[
    "ratchet.candidate.v1", "ratchet.verdict.v1", "ratchet.proposal.v1", "ratchet.release.v1", "ratchet.rollback.v1",
    "ratchet.deletion.v1", "ratchet.gap.v1", "ratchet.feedback.v1", "ratchet.index.v1",
]  # fmt: skip
SYSTEM_ACTORS: Final = frozenset({"controller", "updater", "guard", "ratchet"})
"""Actors that are parts of Ratchet; every other actor is a person, or acts for one."""
ResubmissionState = Literal["sending", "sent", "failed"]
DeletionState = Literal["requested", "removed", "held", "done"]
ReportedVerdict = Literal["right", "wrong", "correct", "chosen"]
"""``correct``: wrong, and the caller says what is right; ``chosen``: one of the samples that were found."""
FeedbackVerdict = Literal[ReportedVerdict, "audit"]
"""``audit``: not reported, but drawn at random for a review."""
AUDITOR: Final = "audit"
"""Caller of audited answers; no key has this name."""
CorrectionState = Literal["waiting", "accepted", "dismissed", "published"]
IndexState = Literal["planned", "filling", "verified", "ready", "live", "retained", "dropped"]
"""``verified``: its recall was measured; ``ready``: all rows are in it; ``retained``: it was live, for a rollback."""


class UtcTime(TypeDecorator[datetime]):
    """Aware UTC times on every database: SQLite drops the zone, so it is restored."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_now() -> datetime:
    return datetime.now(UTC)


class Base(MappedAsDataclass, DeclarativeBase):
    type_annotation_map = {datetime: UtcTime, dict[str, Any]: JSON, dict[str, int]: JSON}  # noqa: RUF012

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        required = {each.name: (each.default, each.default_factory) == (MISSING, MISSING) for each in fields(cls)}
        hints = {name: get_args(hint)[0] for name, hint in get_annotations(cls, eval_str=True).items()}
        schema = core_schema.typed_dict_schema(
            {
                name: core_schema.typed_dict_field(handler.generate_schema(hint), required=required[name])
                for name, hint in hints.items()
            }
        )
        return core_schema.no_info_after_validator_function(
            lambda values: cls(**values),
            schema,
            serialization=core_schema.plain_serializer_function_ser_schema(asdict, return_schema=schema),
        )


class AdapterRow(Base, kw_only=True):
    """An immutable adapter for one base, and the embedding spaces it makes."""

    __tablename__ = "adapters"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    family: Mapped[Family] = mapped_column(String(16))
    base: Mapped[str] = mapped_column(String(64))
    image_space: Mapped[str] = mapped_column(String(64))
    text_space: Mapped[str] = mapped_column(String(64))
    meta: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)
    withdrawn: Mapped[str | None] = mapped_column(Text, default=None)
    """The guard's reason for withdrawing it; it is not released again unless an operator forces it."""
    digest: Mapped[str | None] = mapped_column(String(64), default=None)
    """SHA-256 of its directory, see :func:`core.artifacts.directory_digest`; None for adapters from before this
    column."""
    collected_at: Mapped[datetime | None] = mapped_column(default=None)
    """Time of the decision to delete its files; see :mod:`core.ledger.collection`."""
    collected_bytes = mapped_column(BigInteger)
    """Bytes freed; None until the files are deleted."""


class UpdateRow(Base, kw_only=True):
    """A run of the trainer. ``data_from``/``data_to`` are next offsets by ``topic:partition``."""

    __tablename__ = "updates"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    family: Mapped[Family] = mapped_column(String(16), index=True)
    state: Mapped[UpdateState] = mapped_column(String(16))
    recipe: Mapped[dict[str, Any]]
    seed: Mapped[int]
    store_version: Mapped[int]
    data_from: Mapped[dict[str, int]]
    data_to: Mapped[dict[str, int]]
    incumbent: Mapped[str | None] = mapped_column(String(64))
    adapter: Mapped[str | None] = mapped_column(String(64), default=None)
    cost: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    error: Mapped[str | None] = mapped_column(Text, default=None)
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default_factory=utc_now, onupdate=utc_now)


class VerdictRow(Base, kw_only=True):
    __tablename__ = "verdicts"
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    update_id: Mapped[str] = mapped_column(ForeignKey("updates.id"), unique=True)
    adapter: Mapped[str] = mapped_column(String(64))
    outcome: Mapped[GateOutcome] = mapped_column(String(16))
    report_key: Mapped[str] = mapped_column(Text)
    summary: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)

    @property
    def gain(self) -> float:
        """Mean difference to the base over the gain suites, as a share; NaN without any."""
        return self._mean_difference("gain")

    @property
    def forgetting(self) -> float:
        """Mean loss to the base over the retention suites, as a share; negative for an improvement."""
        return -self._mean_difference("retention")

    def _mean_difference(self, role: str) -> float:
        suites = [suite for suite in self.summary.get("suites", {}).values() if suite["role"] == role]
        return sum(suite["after"] - suite["base"] for suite in suites) / len(suites) if suites else math.nan


class ReleaseAuditRow(Base, kw_only=True):
    """An audit of a live adapter on the sealed items, against the base and the adapter of the last audit that passed
    (``reference``; None: there was none)."""

    __tablename__ = "release_audits"
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    family: Mapped[Family] = mapped_column(String(16))
    base: Mapped[str] = mapped_column(String(64))
    release: Mapped[int] = mapped_column(ForeignKey("releases.number"))
    adapter: Mapped[str] = mapped_column(String(64))
    reference: Mapped[str | None] = mapped_column(String(64))
    reference_release: Mapped[int | None]
    passed: Mapped[bool]
    data_to: Mapped[dict[str, int]]
    """End of the data that the adapter has learned; sealed samples before it join the rest."""
    summary: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)

    @property
    def outcome(self) -> str:
        return "passed" if self.passed else "failed"

    @property
    def back_to(self) -> int:
        """The release that takes a failed one back: that of the last audit that passed, or the first one."""
        return self.reference_release or 1

    @property
    def advice(self) -> str:
        back = f"ratchet releases rollback --family {self.family} --to {self.back_to}"
        return f"`{back}` takes it back, and updates go on after `ratchet releases resume`"


class ProposalRow(Base, kw_only=True):
    """A request to release, by the updater after a passed verdict, or by an operator. ``clip`` and ``vlm`` only count
    if ``family`` includes them."""

    __tablename__ = "proposals"
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    kind: Mapped[ProposalKind] = mapped_column(String(16))
    family: Mapped[Scope] = mapped_column(String(16), server_default="clip")
    clip: Mapped[str | None] = mapped_column(String(64))
    vlm: Mapped[str | None] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    state: Mapped[ProposalState] = mapped_column(String(16), default="pending", index=True)
    error: Mapped[str | None] = mapped_column(Text, default=None)
    release: Mapped[int | None] = mapped_column(default=None)
    update_id: Mapped[str | None] = mapped_column(ForeignKey("updates.id"), unique=True, default=None)
    expected_live: Mapped[int | None] = mapped_column(default=None)
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default_factory=utc_now, onupdate=utc_now)
    share: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """See :attr:`ReleaseRow.share`. For an update ``rollout.mode`` decides it at release."""
    forced: Mapped[bool] = mapped_column(default=False, server_default=false())
    attempt = mapped_column(String(32), unique=True, index=True)
    """ID of the writing call, to find the row if the response to COMMIT was lost."""


class ReleaseRow(Base, kw_only=True):
    """The adapters served under a number; ``None`` is the base alone."""

    __tablename__ = "releases"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    clip: Mapped[str | None] = mapped_column(String(64))
    vlm: Mapped[str | None] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    proposal_id: Mapped[int | None] = mapped_column(ForeignKey("proposals.id"))
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)
    share: Mapped[float] = mapped_column(default=1.0, server_default="1")
    """1: a full release. Between: a canary, which answers this share of requests while the newest older full release
    answers the others. 0: a shadow, whose answers are only compared."""
    clip_base: Mapped[str | None] = mapped_column(String(64), default=None)
    """Digest of the base of ``clip``, or of the base alone; None as long as no other base was ever live."""
    attempt = mapped_column(String(32), unique=True, index=True)

    @property
    def plain(self) -> bool:
        return self.share >= 1.0

    def adapter(self, family: Family) -> str | None:
        return self.clip if family == "clip" else self.vlm


class BaseUpgradeRow(Base, kw_only=True):
    """An upgrade between bases: digests of both and their registered names."""

    __tablename__ = "base_upgrades"
    update_id: Mapped[str] = mapped_column(ForeignKey("updates.id"), primary_key=True)
    old_base: Mapped[str] = mapped_column(String(64))
    old_name: Mapped[str] = mapped_column(String(64))
    new_base: Mapped[str] = mapped_column(String(64))
    new_name: Mapped[str] = mapped_column(String(64))
    gflops: Mapped[float]
    """Its budget, in MAF-GFLOPs, separate from the token bucket."""
    actor: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)


class ChargeRow(Base, kw_only=True):
    """A charge to the token bucket in MAF-GFLOPs; the key makes it idempotent."""

    __tablename__ = "budget_charges"
    key: Mapped[str] = mapped_column(String(100), primary_key=True)
    amount: Mapped[float]
    settled: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)


class BucketRow(Base, kw_only=True):
    """The token bucket: its level, and the latest refill (seconds since 1970)."""

    __tablename__ = "budget_bucket"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    level: Mapped[float]
    refilled_at: Mapped[float]


def answers(share: float) -> str:
    if share >= 1:
        return "all"
    return f"canary {100 * share:.3g}%" if share > 0 else "shadow"


class HoldRow(Base, kw_only=True):
    __tablename__ = "holds"
    id = mapped_column(Integer, primary_key=True)
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)
    resumed_at = mapped_column(UtcTime)


class AuditRow(Base, kw_only=True):
    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    actor: Mapped[str] = mapped_column(String(200))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(200))
    detail: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)


class KeyRow(Base, kw_only=True):
    """An API key, without its secret: ``digest`` is the secret's SHA-256 in hex. Names are never reused, so that audit
    rows stay unambiguous."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[KeyScope]] = mapped_column(JSON)
    digest: Mapped[str] = mapped_column(String(64), repr=False)
    requests_per_minute: Mapped[int | None]
    actor: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)
    revoked_at: Mapped[datetime | None] = mapped_column(default=None)
    last_used_at: Mapped[datetime | None] = mapped_column(default=None)
    expires_at: Mapped[datetime | None] = mapped_column(default=None)

    def expired(self) -> bool:
        return self.expires_at is not None and self.expires_at <= utc_now()


class ResubmissionRow(Base, kw_only=True):
    """The latest resubmission of a quarantined record. ``place`` is its position when it was quarantined."""

    __tablename__ = "resubmissions"
    place: Mapped[str] = mapped_column(String(300), primary_key=True)
    state: Mapped[ResubmissionState] = mapped_column(String(16))
    times: Mapped[int]
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    updated_at: Mapped[datetime] = mapped_column(default_factory=utc_now)


class EventRow(Base, kw_only=True):
    """An event for other programs. ``id`` orders events, ``event_id`` is derived from the fact; ``partition`` and
    ``offset`` locate it in its topic once published."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_published", "published", "id"),)
    id: Mapped[int] = mapped_column(primary_key=True, default=None)
    event_id: Mapped[str] = mapped_column(String(200), unique=True)
    type: Mapped[EventType] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(300))
    data: Mapped[dict[str, Any]]
    time: Mapped[datetime] = mapped_column(default_factory=utc_now)
    published: Mapped[bool] = mapped_column(default=False)
    partition: Mapped[int | None] = mapped_column(default=None)
    offset: Mapped[int | None] = mapped_column(BigInteger, default=None)


class LeaseRow(Base, kw_only=True):
    """A time-limited right to do a job; the holder is empty after a release. The epoch grows with each new holder, and
    the row stays."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    epoch: Mapped[int]
    expires_at: Mapped[datetime]


class DeletionRow(Base, kw_only=True):
    __tablename__ = "deletions"
    id: Mapped[str] = mapped_column(String(300), primary_key=True)
    selector: Mapped[dict[str, Any]]
    """The samples to delete: see :mod:`streams.store.deletion`."""
    state: Mapped[DeletionState] = mapped_column(String(16), default="requested", index=True)
    """``removed``: no reader finds it any more; ``held``: the bucket keeps old versions of its files; ``done``: its
    bytes are deleted, too."""
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    samples: Mapped[int] = mapped_column(default=0)
    refusals: Mapped[int] = mapped_column(default=0)
    adapters: Mapped[dict[str, Any]] = mapped_column(default_factory=dict)
    """``learned``: adapters trained on some of it; ``may_have_replayed``: adapters that may have drawn it."""
    removed_version: Mapped[int | None] = mapped_column(BigInteger, default=None)
    """First store version in which no reader finds it."""
    version: Mapped[int | None] = mapped_column(BigInteger, default=None)
    """First store version in which no data file has it."""
    update_id: Mapped[str | None] = mapped_column(String(64), default=None)
    requested_at: Mapped[datetime] = mapped_column(default_factory=utc_now)
    removed_at: Mapped[datetime | None] = mapped_column(default=None)
    held_at: Mapped[datetime | None] = mapped_column(default=None)
    """Time when no file of the store had it any more, but the bucket still did."""
    done_at: Mapped[datetime | None] = mapped_column(default=None)
    remains: Mapped[str | None] = mapped_column(Text, default=None)
    """Remains in the bucket, or why they are unknown."""
    remains_until: Mapped[datetime | None] = mapped_column(default=None)


class FeedbackRow(Base, kw_only=True):
    """A caller's report on an answer; one for each caller and answer."""

    __tablename__ = "feedback"
    __table_args__ = (
        Index("ix_feedback_caller", "caller", "created_at"), Index("ix_feedback_release", "release", "route"),
    )  # fmt: skip
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    """Digest of the answer and the caller."""
    caller: Mapped[str] = mapped_column(String(200))
    release: Mapped[int]
    """That gave the answer."""
    route: Mapped[str] = mapped_column(String(16))
    input: Mapped[str] = mapped_column(String(64))
    """Digest of what was asked, hex."""
    answered_at: Mapped[datetime]
    verdict: Mapped[FeedbackVerdict] = mapped_column(String(16))
    detail: Mapped[dict[str, Any]]
    """The rest of the report: label, text, object_id, position, comment, image_digest; of an audit: answered."""
    state: Mapped[CorrectionState | None] = mapped_column(String(16), default=None, index=True)
    """Of a correction with an image, which can become a sample."""
    image: Mapped[bytes | None] = mapped_column(LargeBinary, default=None, deferred=True, repr=False)
    """As it was sent, until the correction is published or dismissed."""
    outcome: Mapped[str | None] = mapped_column(String(300), default=None)
    """Place of the record that was published, or why it was dismissed."""
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)


class DistrustedSourceRow(Base, kw_only=True):
    """A source whose samples no update learns from, and no suite asks for."""

    __tablename__ = "distrusted_sources"
    source: Mapped[str] = mapped_column(String(256), primary_key=True)
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    update_id: Mapped[str | None] = mapped_column(String(64), default=None)
    """The update that passed without the source; None if an operator distrusts it."""
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)


class ScreeningRow(Base, kw_only=True):
    """How much images and texts of samples agree, and which samples were asked; one row for each family."""

    __tablename__ = "screenings"
    family: Mapped[Family] = mapped_column(String(16), primary_key=True)
    offsets: Mapped[dict[str, int]]
    """Next offsets by ``topic:partition``."""
    counts: Mapped[dict[str, Any]]
    """See :class:`updater.data.agreement.Agreements`."""
    updated_at: Mapped[datetime] = mapped_column(default_factory=utc_now, onupdate=utc_now)


class IndexRow(Base, kw_only=True):
    """A table or collection outside whose images are embedded, and whose vectors follow releases."""

    __tablename__ = "indexes"
    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    """Also of the view or alias that clients search."""
    url: Mapped[str] = mapped_column(Text)
    """Without a password."""
    source: Mapped[str] = mapped_column(String(128))
    """Table or collection with the images."""
    id_field: Mapped[str] = mapped_column(String(64))
    image_field: Mapped[str] = mapped_column(String(64))
    paused: Mapped[bool] = mapped_column(default=False)
    problem: Mapped[str] = mapped_column(Text, default="")
    """Why the worker cannot go on; empty: it can."""
    created_at: Mapped[datetime] = mapped_column(default_factory=utc_now)


class IndexSpaceRow(Base, kw_only=True):
    """One image space in an index outside."""

    __tablename__ = "index_spaces"
    name: Mapped[str] = mapped_column(String(40), ForeignKey("indexes.name"), primary_key=True)
    space: Mapped[str] = mapped_column(String(64), primary_key=True)
    state: Mapped[IndexState] = mapped_column(String(16), default="planned")
    rows: Mapped[int] = mapped_column(BigInteger, default=0)
    """With a vector."""
    total: Mapped[int] = mapped_column(BigInteger, default=0)
    """With an image."""
    skipped: Mapped[int] = mapped_column(BigInteger, default=0)
    """Whose image cannot be read."""
    recall: Mapped[float | None] = mapped_column(default=None)
    """Recall@10 of the index by exact search, from 0 to 1, of a sample."""
    updated_at: Mapped[datetime] = mapped_column(default_factory=utc_now, onupdate=utc_now)
