"""Deletions as the ingress asks for them: the store and the ledger block, so they are asked on threads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

from core import metrics
from core.errors import StoreUnavailable
from core.ledger import DeletionState, Ledger
from core.settings import Settings
from serving.own_threads import OwnThreads

SECONDS: Final = 60.0
"""Longest that counting what is selected takes: a look at all rows of the store."""


class DeletionService:
    """Implements :class:`serving.http.app_state.Deletions`."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        # Apart: a store that hangs must not keep receipts waiting, which are in the ledger.
        self._counting = OwnThreads("count-selected")
        self._ledger_threads = OwnThreads("deletions")

    async def selected(self, selector: Mapping[str, str]) -> dict[str, int]:
        """How many ``samples`` and ``refusals`` are selected now. One count at a time."""
        try:
            async with asyncio.timeout(SECONDS):
                return await self._counting.run(self._count, selector)
        except TimeoutError:
            raise StoreUnavailable(f"the sample store did not answer within {SECONDS:.0f} s.", "Try again.") from None

    async def request(self, selector: Mapping[str, str], *, actor: str, reason: str) -> dict[str, Any]:
        """Ask for a deletion. Returns its receipt."""
        from streams.deletion import as_json, request_deletion

        with metrics.operator.action("delete"):
            row = await self._ledger_threads.run(request_deletion, self.ledger, selector, actor=actor, reason=reason)
        return as_json(row)

    async def newest(self, limit: int, state: DeletionState | None) -> list[dict[str, Any]]:
        """Receipts, newest first."""
        from streams.deletion import as_json

        rows = await self._ledger_threads.run(self.ledger.deletions, limit, [state] if state else [])
        return [as_json(row) for row in rows]

    async def one(self, deletion_id: str) -> dict[str, Any] | None:
        """The receipt of one, or None."""
        from streams.deletion import as_json

        row = await self._ledger_threads.run(self.ledger.deletion, deletion_id)
        return None if row is None else as_json(row)

    def _count(self, selector: Mapping[str, str]) -> dict[str, int]:
        from streams.deletion import count_selected
        from streams.store import SampleStore

        return asdict(count_selected(SampleStore(self.settings.lake), selector))
