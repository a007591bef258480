"""The ledger's tables (SQLAlchemy 2). Migrations are in the folder of that name; a test compares both."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, ForeignKey, Index, String, Text, TypeDecorator, false
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class UtcTime(TypeDecorator[datetime]):
    """Aware UTC times on every database: SQLite forgets the zone, so it is put back."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.astimezone(UTC) if value is not None else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def utc_now() -> datetime:
    """Now, aware, UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Common column types."""

    type_annotation_map = {datetime: UtcTime, dict[str, Any]: JSON, dict[str, int]: JSON}  # noqa: RUF012


class Adapter(Base):
    __tablename__ = "adapters"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    family: Mapped[str] = mapped_column(String(16))
    base: Mapped[str] = mapped_column(String(64))
    image_space: Mapped[str] = mapped_column(String(64))
    text_space: Mapped[str] = mapped_column(String(64))
    meta: Mapped[dict[str, Any]]
    digest: Mapped[str | None] = mapped_column(String(64))
    """SHA-256 of the directory, see :func:`core.artifacts.directory_digest`; None for those of before it was kept."""
    withdrawn: Mapped[str | None] = mapped_column(Text)
    collected_at: Mapped[datetime | None]
    """When it was decided that its files are deleted."""
    collected_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Bytes that this freed; None until they are gone."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Update(Base):
    __tablename__ = "updates"
    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    family: Mapped[str] = mapped_column(String(16), index=True)
    state: Mapped[str] = mapped_column(String(16))
    recipe: Mapped[dict[str, Any]]
    seed: Mapped[int]
    store_version: Mapped[int]
    data_from: Mapped[dict[str, int]]
    data_to: Mapped[dict[str, int]]
    incumbent: Mapped[str | None] = mapped_column(String(64))
    adapter: Mapped[str | None] = mapped_column(String(64))
    cost: Mapped[dict[str, Any]] = mapped_column(default=dict)
    error: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)


class Verdict(Base):
    __tablename__ = "verdicts"
    id: Mapped[int] = mapped_column(primary_key=True)
    update_id: Mapped[str] = mapped_column(ForeignKey("updates.id"), unique=True)
    adapter: Mapped[str] = mapped_column(String(64))
    outcome: Mapped[str] = mapped_column(String(16))
    report_key: Mapped[str] = mapped_column(Text)
    summary: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Proposal(Base):
    __tablename__ = "proposals"
    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    family: Mapped[str] = mapped_column(String(16), server_default="clip")
    clip: Mapped[str | None] = mapped_column(String(64))
    vlm: Mapped[str | None] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(16), default="pending", index=True)
    error: Mapped[str | None] = mapped_column(Text)
    release: Mapped[int | None]
    update_id: Mapped[str | None] = mapped_column(ForeignKey("updates.id"), unique=True)
    expected_live: Mapped[int | None]
    share: Mapped[float] = mapped_column(default=1.0, server_default="1")
    forced: Mapped[bool] = mapped_column(default=False, server_default=false())
    attempt: Mapped[str | None] = mapped_column(String(32), unique=True, index=True)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now, onupdate=utc_now)


class Release(Base):
    __tablename__ = "releases"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    clip: Mapped[str | None] = mapped_column(String(64))
    vlm: Mapped[str | None] = mapped_column(String(64))
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    proposal_id: Mapped[int | None] = mapped_column(ForeignKey("proposals.id"))
    share: Mapped[float] = mapped_column(default=1.0, server_default="1")
    attempt: Mapped[str | None] = mapped_column(String(32), unique=True, index=True)
    """Names the call that wrote the row, so that it can be found when the answer to COMMIT was lost."""
    clip_base: Mapped[str | None] = mapped_column(String(64))
    """Digest of the base that ``clip`` is an adapter of, or that answers alone; None as long as there was only one."""
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class BaseUpgrade(Base):
    """An update that trains an adapter of another base than the live one, from nothing. Digests of both bases, and the
    names under which they were registered; MAF-GFLOPs.
    """

    __tablename__ = "base_upgrades"
    update_id: Mapped[str] = mapped_column(ForeignKey("updates.id"), primary_key=True)
    old_base: Mapped[str] = mapped_column(String(64))
    old_name: Mapped[str] = mapped_column(String(64))
    new_base: Mapped[str] = mapped_column(String(64))
    new_name: Mapped[str] = mapped_column(String(64))
    gflops: Mapped[float]
    actor: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Charge(Base):
    """One spending from the token bucket; the key makes it idempotent. MAF-GFLOPs."""

    __tablename__ = "budget_charges"
    key: Mapped[str] = mapped_column(String(100), primary_key=True)
    amount: Mapped[float]
    settled: Mapped[bool] = mapped_column(default=False)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class Bucket(Base):
    """The token bucket: its level, and the latest time it was refilled (seconds since 1970)."""

    __tablename__ = "budget_bucket"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    level: Mapped[float]
    refilled_at: Mapped[float]


class Hold(Base):
    __tablename__ = "holds"
    id: Mapped[int] = mapped_column(primary_key=True)
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    resumed_at: Mapped[datetime | None]


class Audit(Base):
    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True)
    actor: Mapped[str] = mapped_column(String(200))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(200))
    detail: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=utc_now)


class ApiKey(Base):
    """An API key. Of the secret only the digest is kept; names are never reused, so that an audit row stays clear."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    scopes: Mapped[list[str]] = mapped_column(JSON)
    digest: Mapped[str] = mapped_column(String(64))
    requests_per_minute: Mapped[int | None]
    actor: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=utc_now)
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    expires_at: Mapped[datetime | None]


class Resubmission(Base):
    """A refused record that was sent again; its place is where the topic had it when it was refused."""

    __tablename__ = "resubmissions"
    place: Mapped[str] = mapped_column(String(300), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    times: Mapped[int]
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    updated_at: Mapped[datetime] = mapped_column(default=utc_now)


class Event(Base):
    """An event for other programs. ``partition`` and ``offset``: where its topic has it, once it is published."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_published", "published", "id"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    event_id: Mapped[str] = mapped_column(String(200), unique=True)
    type: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(300))
    data: Mapped[dict[str, Any]]
    time: Mapped[datetime] = mapped_column(default=utc_now)
    published: Mapped[bool] = mapped_column(default=False)
    partition: Mapped[int | None]
    offset: Mapped[int | None] = mapped_column(BigInteger)


class Lease(Base):
    """The right to do a job; the epoch grows with each new holder, and the row stays."""

    __tablename__ = "leases"
    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    epoch: Mapped[int]
    expires_at: Mapped[datetime]


class Deletion(Base):
    """Samples that are to be gone: ``requested``, ``removed`` from the store, ``held`` by the bucket, ``done``."""

    __tablename__ = "deletions"
    id: Mapped[str] = mapped_column(String(300), primary_key=True)
    selector: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16), default="requested", index=True)
    actor: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str] = mapped_column(Text)
    samples: Mapped[int] = mapped_column(default=0)
    refusals: Mapped[int] = mapped_column(default=0)
    adapters: Mapped[dict[str, Any]] = mapped_column(default=dict)
    removed_version: Mapped[int | None] = mapped_column(BigInteger)
    version: Mapped[int | None] = mapped_column(BigInteger)
    update_id: Mapped[str | None] = mapped_column(String(64))
    requested_at: Mapped[datetime] = mapped_column(default=utc_now)
    removed_at: Mapped[datetime | None]
    held_at: Mapped[datetime | None]
    done_at: Mapped[datetime | None]
    remains: Mapped[str | None] = mapped_column(Text)
    remains_until: Mapped[datetime | None]
