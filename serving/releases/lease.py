"""The lease of the release controller: of several servers on one ledger, one prepares and commits proposals."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from typing import Final

from core.errors import LedgerError
from core.ledger.leases import CONTROLLER_LEASE
from core.ledger.ledger import Ledger

log = logging.getLogger("ratchet.controller")
LEASE_SECONDS: Final = 6.0
"""A controller that was killed is replaced after this. One that is only slow loses nothing while nobody else asks: the
epoch stays its own."""
RENEW_SECONDS: Final = 1.5


class ControllerLease:
    """The right to prepare and commit proposals. Use from one event loop."""

    def __init__(self, ledger: Ledger, seconds: float = LEASE_SECONDS) -> None:
        self._ledger = ledger
        self._seconds = seconds
        self._holder = f"{socket.gethostname()[:60]}-{os.getpid()}-{secrets.token_hex(8)}"
        self._epoch: int | None = None

    @property
    def epoch(self) -> int | None:
        """None while another process has the lease. It stays while the ledger is away: its writes check it."""
        return self._epoch

    async def keep(self) -> bool:
        """Renew the lease, or take it if it is free. Returns whether this process has just gained or lost it.

        Raises:
            LedgerError: the ledger is away.
        """
        before = self._epoch
        if before is None or not await asyncio.to_thread(
            self._ledger.renew_lease, CONTROLLER_LEASE, before, self._seconds
        ):
            self._epoch = await asyncio.to_thread(
                self._ledger.acquire_lease, CONTROLLER_LEASE, self._holder, self._seconds
            )
        if self._epoch != before:
            log.info("this controller %s", "steps down" if self._epoch is None else f"leads with epoch {self._epoch}")
        return self._epoch != before

    def lost(self) -> None:
        """A write was refused: another process has taken over."""
        self._epoch = None

    def give_back(self) -> None:
        """Let the next controller begin at once. One that cannot reach the ledger lets the lease run out."""
        epoch, self._epoch = self._epoch, None
        if epoch is None:
            return
        try:
            self._ledger.release_lease(CONTROLLER_LEASE, epoch)
        except LedgerError as error:
            log.info("the lease runs out by itself: %s", error)
