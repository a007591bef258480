"""Bringing the duplicate index up to date beside the loop, while the process joins its group."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from streams.quality.duplicates import DuplicateIndex
from streams.table import SampleTable


class Indexing:
    """Reads into the index what the store holds, on a thread of its own: some 10 s for each million samples where there
    is no index yet. The loop polls meanwhile, without claiming anything, so that the group keeps this member."""

    def __init__(self, index: DuplicateIndex, table: SampleTable) -> None:
        self._index = index
        self._table = table
        self._executor = ThreadPoolExecutor(1, "duplicate-index")
        self._run: Future[None] | None = None
        self._stopping = False

    def start(self) -> None:
        """Begin, unless it runs already. Nobody else may use the index until it is :meth:`done`."""
        if self._run is None or self._run.done():
            self._run = self._executor.submit(self._follow)

    def done(self) -> bool:
        """Whether the index is up to date.

        Raises:
            StoreUnavailable: the store cannot be read, or the index not be written; :meth:`start` tries again.
        """
        if self._run is None or not self._run.done():
            return False
        self._run.result()
        return True

    def stop(self) -> None:
        """End it soon; what it has read in vain is read again by the next process."""
        self._index.interrupt()
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _follow(self) -> None:
        with self._index.deciding():
            self._index.follow(self._table)
