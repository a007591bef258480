"""The quarantine as the ingress asks it: the store, the ledger and Kafka block, so they are asked on threads."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from core import metrics
from core.ledger import Ledger
from core.settings import Settings
from serving.own_threads import OwnThreads

if TYPE_CHECKING:
    from streams.resubmit import RefusalFilter

SHOWN: Final = 50
"""Reasons and sources in the counts."""
PER_SECOND: Final = 100.0
"""Records that are sent again by one call: at most 500, so it takes five seconds."""


class QuarantineService:
    """Implements :class:`serving.http.app_state.Quarantine`. One call at a time: each may hold a large record."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._turn = asyncio.Lock()
        self._bulk = asyncio.Lock()
        self._threads = OwnThreads("quarantine", 2)

    async def newest(self, limit: int, reason: str | None, source: str | None) -> list[dict[str, Any]]:
        """Refused records, newest first."""
        from streams.resubmit import list_quarantine

        async with self._turn:
            rows = await self._threads.run(list_quarantine, self.settings, self.ledger, limit, reason, source)
        records = []
        for row in rows:
            sent = row.resubmission
            resubmission = sent and {**asdict(sent), "updated_at": sent.updated_at.isoformat()}
            records.append({**asdict(row), "refused_at": row.refused_at.isoformat(), "resubmission": resubmission})
        return records

    async def counts(self, reason: str | None, source: str | None) -> dict[str, dict[str, int]]:
        """Refused records by ``reason`` and by ``source``; the most frequent of each."""
        from streams.sample_queries import refusal_counts
        from streams.store import SampleStore

        async with self._turn:
            tallies = await self._threads.run(refusal_counts, SampleStore(self.settings.lake), reason, source)
        return {name: dict(values.top(SHOWN)) for name, values in tallies.items()}

    async def resubmit(self, place: str, *, actor: str, reason: str, force: bool) -> dict[str, Any]:
        """Send one again; where the topic has it now. An operator who hangs up does not stop it half way."""
        from streams.resubmit import resubmit

        async def send() -> dict[str, Any]:
            async with self._turn:
                with metrics.operator.action("resubmit"):
                    sent = await self._threads.run(
                        resubmit, self.settings, self.ledger, place, actor=actor, reason=reason, force=force
                    )
            return {"topic": sent.topic, "partition": sent.partition, "offset": sent.offset}

        return await asyncio.shield(asyncio.ensure_future(send()))

    async def resubmit_many(self, which: RefusalFilter, *, actor: str, reason: str, dry_run: bool) -> dict[str, Any]:
        """Send many again; an operator who hangs up does not stop it half way."""
        from streams.resubmit import resubmit_many

        async def send() -> dict[str, Any]:
            async with self._bulk:
                with metrics.operator.action("resubmit"):
                    report = await self._threads.run(
                        resubmit_many, self.settings, self.ledger, which, actor=actor, reason=reason, dry_run=dry_run,
                        per_second=PER_SECOND,
                    )  # fmt: skip
            return report.as_json()

        return await asyncio.shield(asyncio.ensure_future(send()))
