"""The quarantine as the ingress asks it: the store, the ledger and Kafka block, so they are asked on threads."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from ops import metrics
from ops.ledger import Ledger
from ops.settings import Settings


class RefusedRecords:
    """Implements :class:`serving.http.gateway.Quarantine`. One call at a time: each may hold a large record."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._turn = asyncio.Lock()

    async def newest(self, limit: int, reason: str | None) -> list[dict[str, Any]]:
        """Refused records, newest first."""
        from streams.resubmit import list_quarantine

        async with self._turn:
            rows = await asyncio.to_thread(list_quarantine, self.settings, self.ledger, limit, reason)
        found = []
        for row in rows:
            again = row.resubmission
            told = again and {**asdict(again), "updated_at": again.updated_at.isoformat()}
            found.append({**asdict(row), "refused_at": row.refused_at.isoformat(), "resubmission": told})
        return found

    async def resubmit(self, place: str, *, actor: str, reason: str, force: bool) -> dict[str, Any]:
        """Send one again; where the topic has it now. An operator who hangs up does not stop it half way."""
        from streams.resubmit import resubmit

        async def send() -> dict[str, Any]:
            async with self._turn:
                with metrics.operator.action("resubmit"):
                    sent = await asyncio.to_thread(
                        resubmit, self.settings, self.ledger, place, actor=actor, reason=reason, force=force
                    )
            return {"topic": sent.topic, "partition": sent.partition, "offset": sent.offset}

        return await asyncio.shield(asyncio.ensure_future(send()))
