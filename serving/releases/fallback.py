"""Takes back a live adapter that no replica can load, so that what answers is what the ledger says."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from core import metrics
from core.errors import RatchetError, ReleaseError
from core.ledger.ledger import Ledger
from core.ledger.rows import Family, ReleaseRow
from serving.releases.commands import RollbackCommand
from serving.releases.protocol import ReleaseProtocol
from serving.releases.types import Prepared, ReleaseResult

log = logging.getLogger("ratchet.fallback")
CHECK_SECONDS: Final = 2.0
ANSWER_SECONDS: Final = 30.0
"""For all replicas to say whether they hold an adapter. One that is starting is no reason to wait: the next check asks
again."""
MAX_RELEASES: Final = 50
"""How far back an adapter that can be loaded is looked for."""
Prepare = Callable[[str | None], Awaitable[Sequence[Prepared]]]


class Fallback:
    """Asks all replicas for the live adapters. One whose files are gone or damaged everywhere is rolled back in the
    ledger, by ``ratchet`` and with the reason, to the newest release that can be loaded. Until that is written the
    ingress answers with that same release, and the alert RatchetAdapterUnservable is on.
    """

    def __init__(
        self, ledger: Ledger, protocol: ReleaseProtocol, prepare: Prepare, prepare_vlm: Prepare | None
    ) -> None:
        """``prepare``, ``prepare_vlm``: ask every replica of a family; None where no VLM is served."""
        self._ledger = ledger
        self._protocol = protocol
        self._prepare: dict[Family, Prepare] = {"clip": prepare}
        if prepare_vlm is not None:
            self._prepare["vlm"] = prepare_vlm
        self._due = 0.0
        self.problem = ""
        """Why an older release than the ledger's answers; empty when it does not."""

    async def step(self) -> ReleaseResult | None:
        """Check every :data:`CHECK_SECONDS`; the release that was made, if one was.

        Raises:
            RatchetError: the ledger cannot be written now, or nothing older can be loaded either.
        """
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + CHECK_SECONDS
        live = await asyncio.to_thread(self._ledger.live)
        if live is None:
            return None
        for family in self._prepare:
            reason = await self._reason(family, live.adapter(family))
            metrics.release.unservable(family, bool(reason))
            if reason:
                self.problem = f"{live.adapter(family)} cannot be loaded: {reason}"
                log.error("%s", self.problem)
                outcome = await self._roll_back(live, family)
                self.problem, self._due = "", 0.0  # the other family may be gone, too
                return outcome
        self.problem = ""
        return None

    async def _roll_back(self, live: ReleaseRow, family: Family) -> ReleaseResult:
        target = await self._target(live, family)
        command = RollbackCommand(
            actor="ratchet", reason=self.problem[:500], expected_live=live.number, to=target.number, family=family
        )
        outcome = await self._protocol.rollback(command)
        metrics.release.unservable(family, False)
        return outcome

    async def _target(self, live: ReleaseRow, family: Family) -> ReleaseRow:
        releases = await asyncio.to_thread(self._ledger.releases, MAX_RELEASES, live.clip_base)
        withdrawn = await asyncio.to_thread(self._ledger.withdrawn, [row.adapter(family) for row in releases])
        collected = await asyncio.to_thread(self._ledger.collected, [row.adapter(family) for row in releases])
        rejected: set[str | None] = {live.adapter(family), *withdrawn, *collected}
        for row in releases:
            adapter = row.adapter(family)
            if row.number >= live.number or not row.plain or adapter in rejected:
                continue
            if not await self._reason(family, adapter):
                return row
            rejected.add(adapter)
        raise ReleaseError(f"{self.problem} No older release can be loaded either.", "Restore the artifacts.")

    async def _reason(self, family: Family, adapter: str | None) -> str:
        """Why no replica can load an adapter; empty when one can, or when it is not known now."""
        if adapter is None:
            return ""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answers = await self._prepare[family](adapter)
        except (TimeoutError, RatchetError):
            return ""
        if answers and all(answer.unservable for answer in answers):
            return answers[0].error
        return ""
