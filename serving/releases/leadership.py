"""Leadership among the servers of one ledger: the release controller that holds the lease changes what is live, and
only one whose CLIP base (``base.clip``) is that of the live release can.

A release of another base changes nothing for the servers that run: they go on with the newest one of theirs, until they
are replaced by servers that have the other base.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from core.digests import digest12
from core.errors import LedgerError, ReleaseError
from core.ledger import Ledger
from core.ledger.leases import CONTROLLER_LEASE
from core.ledger.proposals import ENDED
from core.ledger.rows import ProposalRow, ReleaseRow
from core.settings import Settings
from serving.engines.clip_base import base_of, digest_of, shown

log = logging.getLogger("ratchet.controller")
LEASE_SECONDS: Final = 6.0
"""A controller that was killed is replaced after this. One that is only slow loses nothing while no other asks: the
epoch stays its own."""
RENEW_SECONDS: Final = 1.5
FOLLOW_SECONDS: Final = 0.25
"""Between two looks at a proposal that another controller carries out."""
STANDSTILL_SECONDS: Final = 60.0
"""An order is given up when the other controller neither takes it up nor renews its lease for this long. It may be busy
with another proposal for hours."""


class ControllerLease:
    """The right to prepare and commit proposals. Use from one event loop."""

    def __init__(self, ledger: Ledger, seconds: float = LEASE_SECONDS) -> None:
        self._ledger = ledger
        self._seconds = seconds
        self._holder = f"{socket.gethostname()[:60]}-{os.getpid()}-{secrets.token_hex(8)}"
        self.epoch: int | None = None
        """None while another process has the lease. It stays while the ledger is away: its writes check it."""

    async def keep(self) -> bool:
        """Renew the lease, or take it if it is free. Returns whether this process has just gained or lost it.

        Raises:
            LedgerError: the ledger is away.
        """
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
        """Let the next controller begin at once. One that cannot reach the ledger lets the lease run out."""
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
    """A proposal, once the controller with the lease has carried it out; it fails where that one stands still."""
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
    """A value that changes as long as the leading controller carries proposals out; preparing one may take hours."""
    with ledger.reading():
        states = [(proposal.id, proposal.state) for proposal in ledger.pending_proposals()]
        preparing = any(state == "preparing" for _, state in states)
        return states, ledger.lease(CONTROLLER_LEASE) if preparing else None


@dataclass(frozen=True, slots=True)
class Lineage:
    """The base that a server has."""

    name: str
    digest: str
    home: Path

    @classmethod
    def of(cls, settings: Settings) -> Lineage | None:
        """That of the settings; None where no such base is registered (a process that loads none)."""
        digest = digest_of(settings.home, settings.base.clip)
        return None if digest is None else cls(settings.base.clip, digest, settings.home)

    def has(self, release: ReleaseRow | None) -> bool:
        """True if a release's CLIP has this base. One that names no base is of the only one that there was."""
        return release is None or release.clip_base in (None, self.digest)

    def why_not(self, release: ReleaseRow) -> str:
        """The reason why a release of another base cannot be served; both bases are named."""
        return (
            f"release {release.number} has the base {shown(self.home, str(release.clip_base))}, and this server has "
            f"{self.name!r} ({digest12(self.digest)})"
        )

    def check(self, release: ReleaseRow | None) -> None:
        """Raise ReleaseError for a release of another base."""
        if release is not None and not self.has(release):
            raise ReleaseError(
                f"{self.why_not(release)}.",
                "Ask a server of that base, or change the base: `ratchet base switch`, then base.clip.",
            )


def clip_bases(releases: Sequence[ReleaseRow], names: Mapping[str, str], own: str) -> dict[int, str]:
    """The CLIP base of each release, by its number: the base's name where that is known, and 12 digits of its digest.

    Args:
        names: of the registered bases, by digest.
        own: ``base.clip``. A release that names no base is of the only one that there was: that of the other releases,
            or this.
    """
    digests = {row.clip_base for row in releases if row.clip_base is not None}
    only = next(iter(digests)) if len(digests) == 1 else None

    def base(digest: str | None) -> str:
        if digest is None:
            return own
        return f"{names[digest]} ({digest12(digest)})" if digest in names else digest12(digest)

    return {row.number: base(row.clip_base or only) for row in releases}


def spaces_of_bases(ledger: Ledger, home: Path) -> set[str]:
    """Image spaces of the newest release of every base that was live: their tables stay when the base changes, so that
    a switch back finds its index. Those of a base alone are known where it is registered.
    """
    alone = (base_of(home, str(row.clip_base)) for row in ledger.newest_of_each_base() if row.clip is None)
    return ledger.image_spaces_of_bases() | {base.spaces.image for base in alone if base is not None}
