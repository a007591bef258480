"""Types of the release protocol: adapters by family, what stays resident, what replicas answer, and outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from core.errors import AdapterError, LedgerUnavailable, StoreError
from core.ledger.rows import Family, ProposalKind, ProposalRow, Scope
from serving.releases.observations import Observations
from serving.releases.release_snapshot import ReleaseSnapshot

Adapters = Mapping[Family, str | None]
"""Adapters by family, None for the base alone. A family that is not there keeps what is live."""
Goal = Mapping[Family, str | None]
"""Adapters of both families that a release is to have."""
NO_VLM = "Register a VLM base, set base.vlm to its name, and start again."


Cause = Literal["", "adapter", "storage", "replica"]
"""What an error comes from: the adapter's files, a store that is away, or the replica itself."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """One replica's answer to ``prepare``. ``error`` is empty when it can serve the adapter.

    The spaces are an encoder's; a VLM makes none.
    """

    replica: str
    adapter: str | None
    image_space: str = ""
    text_space: str = ""
    error: str = ""
    cause: Cause = ""

    @property
    def unservable(self) -> bool:
        """Whether no other replica would do better: the adapter itself is gone, damaged or does not fit."""
        return self.cause == "adapter"


@dataclass(frozen=True, slots=True)
class ReleaseResult:
    """A release that is live, and what it took. Times are seconds."""

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


def cause_of(error: Exception) -> Cause:
    """What a failed preparation comes from."""
    if isinstance(error, AdapterError):
        return "adapter"
    return "storage" if isinstance(error, (StoreError, LedgerUnavailable)) else "replica"


def scope_of(adapters: Adapters) -> Scope:
    """The families of some adapters as the ledger writes them."""
    return "both" if len(adapters) == 2 else next(iter(adapters))


def proposed_adapters(proposal: ProposalRow) -> Adapters:
    """What a proposal sets."""
    named: Adapters = {"clip": proposal.clip, "vlm": proposal.vlm}
    return named if proposal.family == "both" else {proposal.family: named[proposal.family]}


@dataclass(frozen=True, slots=True)
class Residency:
    """Resident releases with their embedding spaces: what replicas are told."""

    window: tuple[ReleaseSnapshot, ...]
    """Newest first: requests may name these."""
    indexed: tuple[ReleaseSnapshot, ...]
    """The window and what is behind it: the catalog keeps their image spaces complete."""
    vlms: tuple[str | None, ...]

    @property
    def clips(self) -> tuple[str | None, ...]:
        """CLIP adapters, the live one first."""
        return tuple(dict.fromkeys(snapshot.clip for snapshot in self.indexed))


class Broadcast(Protocol):
    """The replicas, as the protocol needs them. Each call reaches every replica that runs at that moment."""

    @property
    def has_vlm(self) -> bool:
        """Whether there are VLM replicas."""

    async def prepare(self, clip: str | None) -> list[Prepared]:
        """Every encoder loads the adapter beside what it serves, and runs golden inputs."""

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        """Every VLM replica does the same."""

    async def vlm_answers(self) -> bool:
        """Whether a VLM replica answers at this moment."""

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool) -> int:
        """Bring the catalog to full coverage of the image space (``wait=False``: only ask); returns its rows."""

    async def resident(self) -> list[ReleaseSnapshot]:
        """What ingress replicas answer with at this moment, of those that say so at once."""

    async def announce(self, residency: Residency, seconds: float) -> int:
        """Tell every replica what is resident; returns how many acknowledged. Raises ReleaseError when not all did."""

    async def observations(self) -> list[Observations]:
        """What each ingress replica saw of the release that is watched."""

    async def in_flight(self) -> dict[int, int]:
        """Requests being answered, by release number, over all ingress replicas."""

    async def retire_spaces(self, keep: Sequence[ReleaseSnapshot], epoch: int | None) -> None:
        """Let the catalog let go of all other image spaces; with the epoch of the controller's lease their tables are
        dropped.
        """

    async def retire(self, clips: Sequence[str | None], vlms: Sequence[str | None]) -> None:
        """Unload all other adapters."""
