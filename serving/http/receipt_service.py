"""Receipts as the ingress asks for them: the store blocks, and may hang, so it is asked on threads of its own."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from core.errors import StoreUnavailable
from core.settings import Settings

SECONDS: Final = 10.0
"""Longest that a caller waits, for a thread and for the store."""
THREADS: Final = 2


class ReceiptService:
    """Implements :class:`serving.http.app_state.Receipts`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Not the loop's own threads: a store that hangs must not take those that read keys and releases.
        self._threads = ThreadPoolExecutor(THREADS, "receipts")
        self._store: Any = None

    async def of_position(self, topic: str, partition: int, offset: int) -> list[dict[str, Any]]:
        """What became of a record; at least one receipt."""
        from streams.receipts import RecordQuery

        return await self._trace(RecordQuery(topic, partition, offset))

    async def of_sample(self, sample_id: str) -> list[dict[str, Any]]:
        """What became of the records of a sample."""
        return await self._trace(sample_id)

    async def _trace(self, query: Any) -> list[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(SECONDS):
                return await loop.run_in_executor(self._threads, self._read, query)
        except TimeoutError:
            raise StoreUnavailable(f"the sample store did not answer within {SECONDS:.0f} s.", "Try again.") from None

    def _read(self, query: Any) -> list[dict[str, Any]]:
        from streams.receipts import trace
        from streams.store import SampleStore

        if self._store is None:
            self._store = SampleStore(self.settings.lake)
        return [receipt.as_json() for receipt in trace(self._store, query)]
