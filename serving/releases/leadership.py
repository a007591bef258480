"""Leadership among the servers of one ledger: only the controller that holds the lease changes what is live, and only
if its CLIP base (``base.clip``) is that of the live release. A release of another base does not affect running servers:
they keep the newest release of their base until servers with the new base replace them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.digests import digest12
from core.errors import LedgerError, ReleaseError
from core.ledger import Ledger
from core.ledger.leases import CONTROLLER_LEASE, lease_holder
from core.ledger.proposals import ENDED
from core.ledger.rows import ProposalRow, ReleaseRow
from core.settings import Settings
from serving.engines.clip_base import base_of, digest_of, shown

log = logging.getLogger("ratchet.controller")
LEASE_SECONDS: Final = 6.0
"""A killed controller is replaced after this. A slow one keeps its epoch as long as no other asks for the lease."""
RENEW_SECONDS: Final = 1.5
FOLLOW_SECONDS: Final = 0.25
"""Pause between looks at a proposal that another controller carries out."""
STANDSTILL_SECONDS: Final = 60.0
"""A proposal fails when the other controller neither takes it up nor renews its lease for this long; it may be busy
with another proposal for hours."""


class ControllerLease:
    """The right to prepare and commit proposals. Use from one event loop."""

    def __init__(self, ledger: Ledger, seconds: float = LEASE_SECONDS) -> None:
        self._ledger = ledger
        self._seconds = seconds
        self._holder = lease_holder()
        self.epoch: int | None = None
        """None while another process has the lease. Kept while the ledger is away, because writes check it."""

    async def keep(self) -> bool:
        """Renew the lease, or take it if it is free. Returns whether it was gained or lost. Raises LedgerError."""
        before = self.epoch
        if before is None or not await asyncio.to_thread(
            self._ledger.renew_lease, CONTROLLER_LEASE, before, self._seconds
        ):
            self.epoch = await asyncio.to_thread(
                self._ledger.acquire_lease, CONTROLLER_LEASE, self._holder, self._seconds
            )
        if self.epoch != before:
            log.info("this controller %s", "steps down" if self.epoch is None else f"leads with epoch {self.epoch}")
        return self.epoch != before

    def give_back(self) -> None:
        """Release the lease for the next controller. Without the ledger it runs out by itself."""
        epoch, self.epoch = self.epoch, None
        if epoch is None:
            return
        try:
            self._ledger.release_lease(CONTROLLER_LEASE, epoch)
        except LedgerError as error:
            log.info("the lease runs out by itself: %s", error)


async def wait_for_leader(
    ledger: Ledger, proposal: ProposalRow, fail: Callable[[ProposalRow, str], None]
) -> ProposalRow:
    """Wait until the controller with the lease has carried a proposal out; without progress the proposal fails."""
    seen: object = None
    moved = time.perf_counter()
    while proposal.state not in ENDED:
        await asyncio.sleep(FOLLOW_SECONDS)
        if (now := await asyncio.to_thread(_movement, ledger)) != seen:
            seen, moved = now, time.perf_counter()
        elif time.perf_counter() - moved > STANDSTILL_SECONDS:
            lease = await asyncio.to_thread(ledger.lease, CONTROLLER_LEASE)
            leader = "none" if lease is None or not lease.holder else lease.holder
            reason = (
                f"proposal {proposal.id} is {proposal.state}, and the controller that leads ({leader}) has done "
                f"nothing for {STANDSTILL_SECONDS:g} s"
            )
            await asyncio.to_thread(fail, proposal, reason)
        proposal = await asyncio.to_thread(ledger.proposal, proposal.id)
    return proposal


def _movement(ledger: Ledger) -> object:
    """A value that changes while the leader makes progress; preparing one proposal may take hours."""
    with ledger.reading():
        states = [(proposal.id, proposal.state) for proposal in ledger.pending_proposals()]
        preparing = any(state == "preparing" for _, state in states)
        return states, ledger.lease(CONTROLLER_LEASE) if preparing else None


@dataclass(frozen=True, slots=True)
class Lineage:
    """The CLIP base of a server."""

    name: str
    digest: str
    home: Path

    @classmethod
    def of(cls, settings: Settings) -> Lineage | None:
        """The base of the settings; None where it is not registered (in processes that load none)."""
        digest = digest_of(settings.home, settings.base.clip)
        return None if digest is None else cls(settings.base.clip, digest, settings.home)

    def has(self, release: ReleaseRow | None) -> bool:
        """True if a release has this base. Releases that name no base are of the only one that existed then."""
        return release is None or release.clip_base in (None, self.digest)

    def why_not(self, release: ReleaseRow) -> str:
        """The reason why a release of another base cannot be served; both bases are named."""
        return (
            f"release {release.number} has the base {shown(self.home, str(release.clip_base))}, and this server has "
            f"{self.name!r} ({digest12(self.digest)})"
        )

    def check(self, release: ReleaseRow | None) -> None:
        if release is not None and not self.has(release):
            raise ReleaseError(
                f"{self.why_not(release)}.",
                "Ask a server of that base, or change the base: `ratchet base switch`, then base.clip.",
            )


def clip_bases(releases: Sequence[ReleaseRow], names: Mapping[str, str], own: str) -> dict[int, str]:
    """The CLIP base of each release number: the base's name, if known, and 12 digits of its digest. ``names``: by
    digest. ``own``: ``base.clip``, for releases that name no base when the others do not have exactly one."""
    digests = {row.clip_base for row in releases if row.clip_base is not None}
    only = next(iter(digests)) if len(digests) == 1 else None

    def base(digest: str | None) -> str:
        if digest is None:
            return own
        return f"{names[digest]} ({digest12(digest)})" if digest in names else digest12(digest)

    return {row.number: base(row.clip_base or only) for row in releases}


def spaces_of_bases(ledger: Ledger, home: Path) -> set[str]:
    """Image spaces of the newest release of every base that was live. Their tables stay when the base changes, so that
    a switch back finds its index. Releases without an adapter count only where their base is registered."""
    alone = (base_of(home, str(row.clip_base)) for row in ledger.newest_of_each_base() if row.clip is None)
    return ledger.image_spaces_of_bases() | {base.spaces.image for base in alone if base is not None}
