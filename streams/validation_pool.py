"""Validating records on several threads at once, and getting the results in the order of each partition."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from streams.assignment import Reading
from streams.quality.validate import Accepted, Received, Row

Validate = Callable[[Received], Accepted | Row]


@dataclass(frozen=True, slots=True)
class Validated:
    """A record with its result."""

    reading: Reading
    end: int
    """The next offset to read behind it."""
    leader_epoch: int
    size: int
    result: Accepted | Row


@dataclass(frozen=True, slots=True)
class _Pending:
    reading: Reading
    received: Received
    leader_epoch: int
    future: Future[Accepted | Row]


class ValidationPool:
    """Threads that validate. Decoding an image releases the GIL, so that each core has its work."""

    def __init__(self, validate: Validate, threads: int, max_bytes: int, max_records: int) -> None:
        """``max_bytes`` and ``max_records``: of the records inside; :attr:`has_room` says whether more may come."""
        self._validate = validate
        self._max_bytes = max_bytes
        self._max_records = max_records
        self._threads = ThreadPoolExecutor(threads, "validate")
        self._pending: dict[Reading, deque[_Pending]] = {}
        self._bytes = 0
        self._records = 0

    def __len__(self) -> int:
        return self._records

    @property
    def has_room(self) -> bool:
        """Whether another poll's records may be added."""
        return self._bytes < self._max_bytes and self._records < self._max_records

    def add(self, reading: Reading, received: Received, leader_epoch: int) -> None:
        """Queue a record."""
        self._queue(_Pending(reading, received, leader_epoch, self._threads.submit(self._validate, received)))

    def add_result(self, reading: Reading, received: Received, result: Row) -> None:
        """Queue a record whose result is known already."""
        future: Future[Accepted | Row] = Future()
        future.set_result(result)
        self._queue(_Pending(reading, received, reading.leader_epoch, future))

    def done(self) -> Iterator[Validated]:
        """Results that are there, each partition's in its order.

        Raises:
            RatchetError: what validation needs is away. The record stays the next of its partition, and is validated
                once more at the next call.
        """
        for reading, queue in list(self._pending.items()):
            while queue and queue[0].future.done():
                first = queue[0]
                try:
                    result = first.future.result()
                except BaseException:
                    again = self._threads.submit(self._validate, first.received)
                    queue[0] = _Pending(reading, first.received, first.leader_epoch, again)
                    raise
                queue.popleft()
                self._bytes -= first.received.size
                self._records -= 1
                yield Validated(reading, first.received.offset + 1, first.leader_epoch, first.received.size, result)
            if not queue:
                self._pending.pop(reading, None)  # whoever takes the results may have asked for more of them

    def wait(self, seconds: float) -> None:
        """Wait until the next result of some partition is there, or for ``seconds``."""
        firsts = [queue[0].future for queue in self._pending.values()]
        if firsts:
            wait(firsts, seconds, FIRST_COMPLETED)

    def finish(self) -> None:
        """Wait until everything inside is validated."""
        wait([each.future for queue in self._pending.values() for each in queue])

    def drop(self, holds: Callable[[Reading], bool]) -> None:
        """Forget the records of readings that do not hold any more."""
        for reading in [each for each in self._pending if not holds(each)]:
            for each in self._pending.pop(reading):
                each.future.cancel()
                self._bytes -= each.received.size
                self._records -= 1

    def _queue(self, record: _Pending) -> None:
        self._pending.setdefault(record.reading, deque()).append(record)
        self._bytes += record.received.size
        self._records += 1

    def close(self) -> None:
        """Let the threads end; what is inside is given up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
