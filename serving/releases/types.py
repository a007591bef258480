"""Types of the release protocol: a release as a request sees it, operators' commands, replicas' answers, results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from core.errors import AdapterError, LedgerUnavailable, RatchetError, StoreError
from core.ledger.rows import Family, ProposalKind, ProposalRow, ReleaseRow, Scope

BASE = "base"
"""Clients' name of a base without an adapter."""
NO_VLM = "Register a VLM base, set base.vlm to its name, and start again."
FAMILIES: tuple[Family, ...] = ("clip", "vlm")
Adapters = Mapping[Family, str | None]
"""Adapters by family, None for the base alone. A missing family keeps what is live."""
TargetAdapters = Mapping[Family, str | None]
"""Adapters of both families of a future release."""


def scope_of(adapters: Adapters) -> Scope:
    return "both" if len(adapters) == 2 else next(iter(adapters))


def proposed_adapters(proposal: ProposalRow) -> Adapters:
    named: Adapters = {"clip": proposal.clip, "vlm": proposal.vlm}
    return named if proposal.family == "both" else {proposal.family: named[proposal.family]}


def target_adapters(adapters: Adapters, stable: ReleaseRow | None) -> TargetAdapters:
    """Both adapters of a release that sets some: the others are those of the newest full release."""
    return {family: adapters.get(family, stable.adapter(family) if stable else None) for family in FAMILIES}


@dataclass(frozen=True, slots=True)
class ReleaseSnapshot:
    """A release as one request sees it. ``clip`` and ``vlm`` are adapter names, None for the base alone. An index may
    be searched only with a query whose text or image space belongs to the same release."""

    release: int
    clip: str | None
    image_space: str
    text_space: str
    vlm: str | None = None
    share: float = 1.0
    """Share of requests that it answers; see :attr:`core.ledger.rows.ReleaseRow.share`."""

    @property
    def spaces(self) -> tuple[str, str]:
        """Digests of the image and the text embedding space."""
        return self.image_space, self.text_space

    @property
    def adapter(self) -> str:
        """The CLIP adapter's name as shown to clients."""
        return self.clip or BASE

    @property
    def vlm_adapter(self) -> str:
        return self.vlm or BASE

    def shown(self, family: Family) -> str:
        return self.adapter if family == "clip" else self.vlm_adapter


@dataclass(frozen=True, slots=True)
class Residency:
    """Resident releases with their embedding spaces, as told to replicas."""

    window: tuple[ReleaseSnapshot, ...]
    """Newest first; requests may name these."""
    indexed: tuple[ReleaseSnapshot, ...]
    """The window and what is behind it; the catalog keeps their image spaces complete."""
    vlms: tuple[str | None, ...]

    @property
    def clips(self) -> tuple[str | None, ...]:
        """CLIP adapters, the live one first."""
        return tuple(dict.fromkeys(snapshot.clip for snapshot in self.indexed))


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """An operator's order, from the HTTP route to the protocol. ``actor`` and ``reason`` are audited."""

    action: ClassVar[str]
    actor: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _LiveCommand(Command):
    expected_live: int
    """The release that was live when the operator decided: if another is live by now, that is a conflict."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseCommand(_LiveCommand):
    """Release adapters; a family that is not named keeps what is live."""

    action = "release"
    adapters: Adapters
    share: float = 1.0
    force: bool = False
    """Also adapters that passed no gate and were never live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromoteCommand(_LiveCommand):
    """Make a full release of the live canary or shadow."""

    action = "promote"


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackCommand(_LiveCommand):
    action = "rollback"
    to: int | None = None
    """Number of the release; None: the newest one with another adapter."""
    family: Family | None = None
    """Only this family's adapter; None: both."""
    allow_withdrawn: bool = False
    """Also to a withdrawn adapter: the guard goes back to the incumbent in any case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldCommand(Command):
    action = "hold"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumeCommand(Command):
    action = "resume"


LiveCommand = ReleaseCommand | PromoteCommand | RollbackCommand
HoldingCommand = HoldCommand | ResumeCommand
Cause = Literal["", "adapter", "storage", "replica"]
"""Origin of an error: the adapter's files, a store that is away, or the replica itself."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A replica's answer to ``prepare``; ``error`` is empty if it can serve the adapter. Only encoders set spaces."""

    replica: str
    adapter: str | None
    image_space: str = ""
    text_space: str = ""
    error: str = ""
    cause: Cause = ""

    @classmethod
    def failed(cls, replica: str, adapter: str | None, error: Exception) -> Prepared:
        reason = str(error) if isinstance(error, RatchetError) else f"{type(error).__name__}: {error}"[:500]
        away = isinstance(error, (StoreError, LedgerUnavailable))
        cause: Cause = "adapter" if isinstance(error, AdapterError) else "storage" if away else "replica"
        return cls(replica, adapter, error=reason, cause=cause)

    @property
    def unservable(self) -> bool:
        """True if no other replica would do better: the adapter itself is gone, damaged or does not fit."""
        return self.cause == "adapter"


@dataclass(frozen=True, slots=True)
class ReleaseResult:
    """A release that is live, and what it took. Times are in seconds."""

    number: int
    clip: str | None
    vlm: str | None
    kind: ProposalKind
    family: Scope
    proposal: int | None
    prepare_seconds: float
    commit_seconds: float
    acknowledged: int
    share: float = 1.0
