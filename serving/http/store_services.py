"""The quarantine, deletions and receipts as routes ask for them.

The store, the ledger and Kafka block, and may hang, so they are asked on threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from core import metrics
from core.errors import StoreUnavailable
from core.ledger import DeletionState, Ledger
from core.settings import Settings
from serving.own_threads import OwnThreads

if TYPE_CHECKING:
    from streams.ingest.resubmit import RefusalFilter


SHOWN: Final = 50
"""Reasons and sources in the counts."""
PER_SECOND: Final = 100.0
"""Records that are sent again by one call: at most 500, so it takes five seconds."""

COUNT_SECONDS: Final = 60.0
"""Longest that counting what is selected takes: a look at all rows of the store."""

TRACE_SECONDS: Final = 10.0
"""Longest that a caller waits, for a thread and for the store."""
TRACE_THREADS: Final = 2


class QuarantineService:
    """Refused records. One call at a time: each may hold a large record."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._turn = asyncio.Lock()
        self._bulk = asyncio.Lock()
        self._threads = OwnThreads("quarantine", 2)

    async def newest(self, limit: int, reason: str | None, source: str | None) -> list[dict[str, Any]]:
        """Refused records, newest first."""
        from streams.ingest.resubmit import list_quarantine

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
        from streams.store.sample_queries import refusal_counts
        from streams.store.sample_store import SampleStore

        async with self._turn:
            tallies = await self._threads.run(refusal_counts, SampleStore(self.settings.lake), reason, source)
        return {name: dict(values.top(SHOWN)) for name, values in tallies.items()}

    async def resubmit(self, place: str, *, actor: str, reason: str, force: bool) -> dict[str, Any]:
        """Send one again; where the topic has it now. An operator who hangs up does not stop it half way."""
        from streams.ingest.resubmit import resubmit

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
        from streams.ingest.resubmit import resubmit_many

        async def send() -> dict[str, Any]:
            async with self._bulk:
                with metrics.operator.action("resubmit"):
                    report = await self._threads.run(
                        resubmit_many, self.settings, self.ledger, which, actor=actor, reason=reason, dry_run=dry_run,
                        per_second=PER_SECOND,
                    )  # fmt: skip
            return report.as_json()

        return await asyncio.shield(asyncio.ensure_future(send()))


class DeletionService:
    """Deletions of samples and of refused records."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        # Apart: a store that hangs must not keep receipts waiting, which are in the ledger.
        self._counting = OwnThreads("count-selected")
        self._ledger_threads = OwnThreads("deletions")

    async def selected(self, selector: Mapping[str, str]) -> dict[str, int]:
        """How many ``samples`` and ``refusals`` are selected now. One count at a time.

        Raises:
            SelectorError, StoreUnavailable.
        """
        try:
            async with asyncio.timeout(COUNT_SECONDS):
                return await self._counting.run(self._count, selector)
        except TimeoutError:
            raise StoreUnavailable(
                f"the sample store did not answer within {COUNT_SECONDS:.0f} s.", "Try again."
            ) from None

    async def request(self, selector: Mapping[str, str], *, actor: str, reason: str) -> dict[str, Any]:
        """Ask for a deletion. Returns its receipt. Raises SelectorError."""
        from streams.store.deletion import as_json, request_deletion

        with metrics.operator.action("delete"):
            row = await self._ledger_threads.run(request_deletion, self.ledger, selector, actor=actor, reason=reason)
        return as_json(row)

    async def newest(self, limit: int, state: DeletionState | None) -> list[dict[str, Any]]:
        """Receipts, newest first."""
        from streams.store.deletion import as_json

        rows = await self._ledger_threads.run(self.ledger.deletions, limit, [state] if state else [])
        return [as_json(row) for row in rows]

    async def one(self, deletion_id: str) -> dict[str, Any] | None:
        """The receipt of one, or None."""
        from streams.store.deletion import as_json

        row = await self._ledger_threads.run(self.ledger.deletion, deletion_id)
        return None if row is None else as_json(row)

    def _count(self, selector: Mapping[str, str]) -> dict[str, int]:
        from streams.store.deletion import count_selected
        from streams.store.sample_store import SampleStore

        return asdict(count_selected(SampleStore(self.settings.lake), selector))


class ReceiptService:
    """What became of records. Both calls raise StoreUnavailable."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Not the loop's own threads: a store that hangs must not take those that read keys and releases.
        self._threads = ThreadPoolExecutor(TRACE_THREADS, "receipts")
        self._store: Any = None

    async def of_position(self, topic: str, partition: int, offset: int) -> list[dict[str, Any]]:
        """What became of a record; at least one receipt."""
        from streams.store.sample_queries import RecordQuery

        return await self._trace(RecordQuery(topic, partition, offset))

    async def of_sample(self, sample_id: str) -> list[dict[str, Any]]:
        """What became of the records of a sample. Raises RecordError for what is no id."""
        return await self._trace(sample_id)

    async def _trace(self, query: Any) -> list[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(TRACE_SECONDS):
                return await loop.run_in_executor(self._threads, self._read, query)
        except TimeoutError:
            raise StoreUnavailable(
                f"the sample store did not answer within {TRACE_SECONDS:.0f} s.", "Try again."
            ) from None

    def _read(self, query: Any) -> list[dict[str, Any]]:
        from streams.store.sample_queries import trace
        from streams.store.sample_store import SampleStore

        if self._store is None:
            self._store = SampleStore(self.settings.lake)
        return [receipt.as_json() for receipt in trace(self._store, query)]
