"""Telling replicas what is resident after a commit: in a short time whoever answers, then whoever did not."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from core.errors import ReleaseError
from serving.releases.types import Broadcast, Residency

log = logging.getLogger("ratchet.announce")
ROLLBACK_SECONDS: Final = 0.3
"""For a rollback. Replicas that answer take some 10 ms; those that do not may be starting, stuck or dead. The message
is on its way to them all the same, they look at the ledger by themselves every second or two, and they are told again.
"""
RELEASE_SECONDS: Final = 10.0
"""For other releases: the operator's call returns when every replica serves the release."""
HEAL_ATTEMPTS: Final = 6
HEAL_PAUSE_SECONDS: Final = 2.0


class Unacknowledged(ReleaseError):
    """Not every replica acknowledged in time; ``acknowledged`` did."""

    def __init__(self, message: str, acknowledged: int) -> None:
        super().__init__(message, "Nothing needs to be done: a replica that was not reached follows the ledger.")
        self.acknowledged = acknowledged


class Announcer:
    """Announces releases that are committed; never fails. Use from one event loop."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._healing: asyncio.Task[None] | None = None

    async def announce(self, residency: Residency, seconds: float) -> int:
        """Tell every replica. Those that do not answer within ``seconds`` are told again in the background, until
        something else is announced. Returns how many acknowledged.
        """
        if self._healing is not None:
            self._healing.cancel()
            self._healing = None
        try:
            async with asyncio.timeout(2 * seconds):  # the broadcast keeps its time limit itself
                return await self._broadcast.announce(residency, seconds)
        except Exception as error:
            log.info("not every replica was reached: %s: %s", type(error).__name__, error)
            self._healing = asyncio.get_running_loop().create_task(self._heal(residency))
            return error.acknowledged if isinstance(error, Unacknowledged) else 0

    async def _heal(self, residency: Residency) -> None:
        for _ in range(HEAL_ATTEMPTS):
            try:
                async with asyncio.timeout(2 * RELEASE_SECONDS):
                    await self._broadcast.announce(residency, RELEASE_SECONDS)
                return
            except Exception as error:
                log.info("a replica is told again: %s: %s", type(error).__name__, error)
            await asyncio.sleep(HEAL_PAUSE_SECONDS)
