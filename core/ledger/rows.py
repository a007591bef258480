"""Frozen rows, as the ledger returns them. Times are UTC."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal

from ratchet_client.models import Family as Family

Scope = Literal["clip", "vlm", "both"]
"""The adapters that a proposal sets; the other stays what is live when it is committed."""
GateOutcome = Literal["passed", "rejected", "inconclusive"]
UpdateState = Literal["training", "trained", "gated", "done", "failed", "abandoned"]
ProposalKind = Literal["initial", "update", "rollback", "release", "promotion"]
ProposalState = Literal["pending", "preparing", "committed", "failed"]
KeyScope = Literal["infer", "search", "publish", "operate"]
"""Rights of a key: ask the models; read the corpus; send quarantined records again; release, roll back, hold and
resume."""
EventType = Literal[
    "ratchet.candidate.v1", "ratchet.verdict.v1", "ratchet.proposal.v1", "ratchet.release.v1", "ratchet.rollback.v1",
    "ratchet.deletion.v1", "ratchet.gap.v1",
]  # fmt: skip
SYSTEM_ACTORS: Final = frozenset({"controller", "updater", "guard", "ratchet"})
"""Actors that are parts of Ratchet; every other actor is a person, or acts for one."""
ResubmissionState = Literal["sending", "sent", "failed"]


@dataclass(frozen=True)
class AdapterRow:
    """An immutable adapter against one base, and the embedding spaces it makes."""

    name: str
    family: str
    base: str
    image_space: str
    text_space: str
    meta: dict[str, Any]
    created_at: datetime
    withdrawn: str | None = None
    """The guard's reason for taking it back; such an adapter is not released again unless an operator forces it."""
    digest: str | None = None
    """SHA-256 of its directory; None for adapters that were recorded before it was kept."""
    collected_at: datetime | None = None
    """When the garbage collector took its files; see :mod:`core.ledger.collection`."""


@dataclass(frozen=True)
class UpdateRow:
    """One run of the trainer. ``data_from``/``data_to`` are next offsets by ``topic:partition``."""

    id: str
    family: str
    state: UpdateState
    recipe: dict[str, Any]
    seed: int
    store_version: int
    data_from: dict[str, int]
    data_to: dict[str, int]
    incumbent: str | None
    adapter: str | None
    cost: dict[str, Any]
    error: str | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class VerdictRow:
    """The gate's verdict on an update's candidate."""

    id: int
    update_id: str
    adapter: str
    outcome: GateOutcome
    report_key: str
    summary: dict[str, Any]
    created_at: datetime

    @property
    def gain(self) -> float:
        """Mean difference to the base over the gain suites, as a share; NaN when there are none."""
        return self._mean_difference("gain")

    @property
    def forgetting(self) -> float:
        """Mean loss to the base over the retention suites, as a share; below 0 where it became better."""
        return -self._mean_difference("retention")

    def _mean_difference(self, role: str) -> float:
        suites = [suite for suite in self.summary.get("suites", {}).values() if suite["role"] == role]
        return sum(suite["after"] - suite["base"] for suite in suites) / len(suites) if suites else math.nan


@dataclass(frozen=True)
class ProposalRow:
    """A wish to release: from the updater after a passed verdict, or from an operator.

    ``clip`` means something where ``family`` is ``clip`` or ``both``, ``vlm`` where it is ``vlm`` or ``both``.
    """

    id: int
    kind: ProposalKind
    family: Scope
    clip: str | None
    vlm: str | None
    actor: str
    reason: str
    state: ProposalState
    error: str | None
    release: int | None
    update_id: str | None
    expected_live: int | None
    created_at: datetime
    updated_at: datetime
    share: float = 1.0
    """See :attr:`ReleaseRow.share`. An update's is decided when it is released, by ``rollout.mode``."""
    forced: bool = False
    """An operator released adapters that no gate had passed."""


@dataclass(frozen=True)
class ReleaseRow:
    """The adapters that are served under a number. ``None`` is the base alone."""

    number: int
    clip: str | None
    vlm: str | None
    actor: str
    reason: str
    proposal_id: int | None
    created_at: datetime
    share: float = 1.0
    """1: a plain release. Between: a canary, which answers this share of the requests while the newest older plain
    release answers the others. 0: a shadow, whose answers are only compared."""
    clip_base: str | None = None
    """Digest of the base of ``clip``, or of the base alone; None as long as no other base was ever live."""

    @property
    def plain(self) -> bool:
        """True if it answers all requests."""
        return self.share >= 1.0

    def adapter(self, family: Family) -> str | None:
        """The adapter of one family."""
        return self.clip if family == "clip" else self.vlm


@dataclass(frozen=True)
class BaseUpgradeRow:
    """An upgrade from one base to another: digests of both and the names under which they were registered."""

    update_id: str
    old_base: str
    old_name: str
    new_base: str
    new_name: str
    gflops: float
    """Its budget, in MAF-GFLOPs; the token bucket is not charged for it."""
    actor: str
    created_at: datetime


def answers(share: float) -> str:
    """Whom a release with this share answers, in words."""
    if share >= 1:
        return "all"
    return f"canary {100 * share:.3g}%" if share > 0 else "shadow"


@dataclass(frozen=True)
class HoldRow:
    """While held, update proposals wait."""

    actor: str
    reason: str
    created_at: datetime


@dataclass(frozen=True)
class AuditRow:
    """An action of somebody, for the audit."""

    id: int
    actor: str
    action: str
    subject: str
    detail: dict[str, Any] = field(default_factory=dict)
    created_at: datetime | None = None


@dataclass(frozen=True)
class KeyRow:
    """An API key, without its secret. ``digest`` is the SHA-256 of the secret, in hex."""

    id: str
    name: str
    scopes: tuple[KeyScope, ...]
    digest: str = field(repr=False)
    requests_per_minute: int | None
    actor: str
    created_at: datetime
    revoked_at: datetime | None
    last_used_at: datetime | None
    expires_at: datetime | None = None
    """None: good until it is revoked."""

    def expired(self) -> bool:
        """True if its time is over."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)


@dataclass(frozen=True)
class ResubmissionRow:
    """A refused record that was sent again: the last time, by whom and why."""

    place: str
    state: ResubmissionState
    times: int
    actor: str
    reason: str
    updated_at: datetime


@dataclass(frozen=True)
class EventRow:
    """An event for other programs. ``id`` orders events, ``event_id`` follows from the fact."""

    id: int
    event_id: str
    type: EventType
    subject: str
    data: dict[str, Any]
    time: datetime
    published: bool
    partition: int | None
    offset: int | None


@dataclass(frozen=True)
class LeaseRow:
    """The right to do a job for some time; the holder is empty when the lease was given back."""

    name: str
    holder: str
    epoch: int
    expires_at: datetime


DeletionState = Literal["requested", "removed", "held", "done"]


@dataclass(frozen=True)
class DeletionRow:
    """A deletion, which is also its receipt."""

    id: str
    selector: dict[str, Any]
    """The samples to delete: see :mod:`streams.store.deletion`."""
    state: DeletionState
    """``removed``: no reader finds it any more; ``held``: the bucket keeps old versions of the files that had it;
    ``done``: its bytes are gone from the disk, too."""
    actor: str
    reason: str
    samples: int
    refusals: int
    adapters: dict[str, Any]
    """``learned``: adapters that were trained on some of it; ``may_have_replayed``: those that may have drawn it."""
    removed_version: int | None
    """Version of the store from which on no reader finds it."""
    version: int | None
    """Version of the store from which on no data file has it."""
    update_id: str | None
    """The first update that was trained without it."""
    requested_at: datetime
    removed_at: datetime | None
    held_at: datetime | None
    """When no file of the store had it any more, and the bucket still did."""
    done_at: datetime | None
    remains: str | None
    """The part that is left of it in the bucket, or why that is not known."""
    remains_until: datetime | None
    """When that can be deleted; None where it is not known."""
