"""Quarantine, deletions and receipts for routes. The store, the ledger and Kafka block, and may hang, so each has
threads of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeVar

from core import metrics
from core.errors import StoreUnavailable
from core.ledger import DeletionState, Ledger
from core.ledger.rows import FeedbackRow
from core.settings import Settings
from serving.own_threads import OwnThreads
from streams.store.deletion import as_json, count_selected, request_deletion
from streams.store.sample_queries import quarantine_counts, trace
from streams.store.sample_store import SampleStore

if TYPE_CHECKING:
    from streams.ingest.resubmit import QuarantineFilter

Result = TypeVar("Result")
SHOWN: Final = 50
PER_SECOND: Final = 100.0
"""Resubmitted records of one call: at most 500, so five seconds."""
COUNT_SECONDS: Final = 60.0
"""Longest time to count selected samples, which reads all rows of the store."""
TRACE_SECONDS: Final = 10.0
"""Longest wait for a thread and the store."""
TRACE_THREADS: Final = 2


async def in_time(work: Awaitable[Result], seconds: float) -> Result:
    """Await the store's answer. Raises StoreUnavailable after ``seconds``."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError:
        raise StoreUnavailable(f"the sample store did not answer within {seconds:.0f} s.", "Try again.") from None


class QuarantineService:
    """Quarantined records. One call at a time, because each may hold a large record."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._threads = OwnThreads("quarantine")
        self._bulk = OwnThreads("resubmit")

    async def newest(self, limit: int, reason: str | None, source: str | None) -> list[dict[str, Any]]:
        from streams.ingest.resubmit import list_quarantine

        rows = await self._threads.run(list_quarantine, self.settings, self.ledger, limit, reason, source)
        return [asdict(row) for row in rows]

    async def counts(self, reason: str | None, source: str | None) -> dict[str, dict[str, int]]:
        """Quarantined records by ``reason`` and by ``source``; the most frequent of each."""
        tallies = await self._threads.run(quarantine_counts, SampleStore(self.settings.lake), reason, source)
        return {name: dict(values.top(SHOWN)) for name, values in tallies.items()}

    async def resubmit(self, place: str, *, actor: str, reason: str, force: bool) -> dict[str, Any]:
        """Send a record again; returns its new position in the topic."""
        from streams.ingest.resubmit import resubmit

        with metrics.operator.action("resubmit"):
            sent = await self._threads.run(
                resubmit, self.settings, self.ledger, place, actor=actor, reason=reason, force=force
            )
        return {"topic": sent.topic, "partition": sent.partition, "offset": sent.offset}

    async def resubmit_many(self, which: QuarantineFilter, *, actor: str, reason: str, dry_run: bool) -> dict[str, Any]:
        from streams.ingest.resubmit import resubmit_many

        with metrics.operator.action("resubmit"):
            report = await self._bulk.run(
                resubmit_many, self.settings, self.ledger, which, actor=actor, reason=reason, dry_run=dry_run,
                per_second=PER_SECOND,
            )  # fmt: skip
        return report.as_json()


class DeletionService:
    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        # Separate, so that a store that hangs does not delay receipts, which are in the ledger.
        self._counting = OwnThreads("count-selected")
        self._ledger_threads = OwnThreads("deletions")

    async def selected(self, selector: Mapping[str, str]) -> dict[str, int]:
        """Count ``samples`` and ``refusals``, one count at a time. Raises SelectorError, StoreUnavailable."""

        def count() -> dict[str, int]:
            return asdict(count_selected(SampleStore(self.settings.lake), selector))

        return await in_time(self._counting.run(count), COUNT_SECONDS)

    async def request(self, selector: Mapping[str, str], *, actor: str, reason: str) -> dict[str, Any]:
        """Request a deletion. Returns its receipt. Raises SelectorError."""
        with metrics.operator.action("delete"):
            row = await self._ledger_threads.run(request_deletion, self.ledger, selector, actor=actor, reason=reason)
        return as_json(row)

    async def newest(self, limit: int, state: DeletionState | None) -> list[dict[str, Any]]:
        rows = await self._ledger_threads.run(self.ledger.deletions, limit, [state] if state else [])
        return [as_json(row) for row in rows]

    async def one(self, deletion_id: str) -> dict[str, Any] | None:
        row = await self._ledger_threads.run(self.ledger.deletion, deletion_id)
        return None if row is None else as_json(row)


class FeedbackService:
    """Records feedback in the ledger before it is acknowledged."""

    def __init__(self, ledger: Ledger, accept: Collection[str] = ()) -> None:
        """``accept``: the setting `feedback.accept`."""
        self.ledger = ledger
        self._accept = accept
        self._threads = OwnThreads("feedback")

    async def record(self, row: FeedbackRow) -> tuple[FeedbackRow, bool]:
        """See :meth:`core.ledger.feedback.FeedbackQueries.record_feedback`."""
        recorded, new = await self._threads.run(self.ledger.record_feedback, row, self._accept)
        if new:
            metrics.feedback.given(row.route, row.verdict)
        return recorded, new


class ReceiptService:
    """Receipts: the outcomes of records. Both calls raise StoreUnavailable."""

    def __init__(self, settings: Settings) -> None:
        self._threads = OwnThreads("receipts", TRACE_THREADS)
        self._store = SampleStore(settings.lake)

    async def of_position(self, topic: str, partition: int, offset: int) -> list[dict[str, Any]]:
        """Receipts of one record, at least one."""
        return await in_time(self._threads.run(self._read, (topic, partition, offset)), TRACE_SECONDS)

    async def of_sample(self, sample_id: str) -> list[dict[str, Any]]:
        """Receipts of a sample's records. Raises RecordError if it is not a sample ID."""
        return await in_time(self._threads.run(self._read, sample_id), TRACE_SECONDS)

    def _read(self, query: Any) -> list[dict[str, Any]]:
        return [receipt.as_json() for receipt in trace(self._store, query)]
