"""Validating several records at once, and getting the results in the order of each partition."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Final, Protocol

from streams.ingest.assignment import Reading
from streams.ingest.quality.validate import Accepted, Received, StoreRow
from streams.ingest.validators import restore

CHUNK_RECORDS: Final = 8
CHUNK_BYTES: Final = 256 << 10
"""Records that are handed over at once: handing over costs some 50 us, as much as a tenth of a small image."""


@dataclass(frozen=True, slots=True)
class Validated:
    """A record with its result."""

    reading: Reading
    end: int
    """The next offset to read behind it."""
    leader_epoch: int
    size: int
    result: Accepted | StoreRow


@dataclass(slots=True)
class _Chunk:
    """Records of one partition in their order, with their leader epochs, and the results that were known before."""

    reading: Reading
    records: list[tuple[Received, int, StoreRow | None]] = field(default_factory=list)
    size: int = 0
    future: Future[list[Accepted | StoreRow]] = field(default_factory=Future)

    @property
    def unknown(self) -> list[Received]:
        """The records whose results were not known before."""
        return [received for received, _, known in self.records if known is None]


class Validators(Protocol):
    """What validates: :mod:`streams.ingest.validators` or :mod:`streams.ingest.validators`."""

    def submit(self, records: Sequence[Received]) -> Future[list[Accepted | StoreRow]]:
        """Validate some records, in the background."""

    def alone(self, received: Received) -> Accepted | StoreRow:
        """Validate a record after a process has died over it or over others."""

    def close(self) -> None:
        """End; what is being validated is given up."""


class ValidationPool:
    """Records that are being validated, in chunks."""

    def __init__(self, validators: Validators, max_bytes: int, max_records: int) -> None:
        """``max_bytes`` and ``max_records``: of the records inside; :attr:`has_room` says whether more may come."""
        self._validators = validators
        self._max_bytes = max_bytes
        self._max_records = max_records
        self._pending: dict[Reading, deque[_Chunk]] = {}
        self._filling: _Chunk | None = None
        self._bytes = 0
        self._records = 0

    def __len__(self) -> int:
        return self._records

    @property
    def has_room(self) -> bool:
        """Whether another poll's records may be added."""
        return self._bytes < self._max_bytes and self._records < self._max_records

    def add(self, reading: Reading, received: Received, leader_epoch: int, result: StoreRow | None = None) -> None:
        """Take in a record, perhaps with its result. It is validated after :meth:`flush`, or when a chunk is full."""
        if self._filling is not None and self._filling.reading is not reading:
            self.flush()
        chunk = self._filling = self._filling or _Chunk(reading)
        chunk.records.append((received, leader_epoch, result))
        chunk.size += received.size
        self._bytes += received.size
        self._records += 1
        if len(chunk.records) >= CHUNK_RECORDS or chunk.size >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Let everything that was added be validated."""
        chunk, self._filling = self._filling, None
        if chunk is not None:
            self._start(chunk)
            self._pending.setdefault(chunk.reading, deque()).append(chunk)

    def take(self) -> list[Validated]:
        """The next results of some partition, in its order; none while no partition has any.

        Raises:
            RatchetError: what validation needs is away. The records stay the next of their partition, and are validated
                once more.
        """
        ready = next((queue for queue in self._pending.values() if queue[0].future.done()), None)
        if ready is None:
            return []
        chunk = ready[0]
        try:
            results = chunk.future.result()
        except BrokenProcessPool:
            results = [self._validators.alone(received) for received in chunk.unknown]
        except BaseException:
            self._start(chunk)
            raise
        ready.popleft()
        if not ready:
            del self._pending[chunk.reading]
        self._forget(chunk)
        fresh = iter(results)
        return [
            Validated(chunk.reading, received.offset + 1, epoch, received.size, known or restore(received, next(fresh)))
            for received, epoch, known in chunk.records
        ]

    def wait(self, seconds: float) -> None:
        """Wait until the next results of some partition are there, or for ``seconds``."""
        firsts = [queue[0].future for queue in self._pending.values()]
        if firsts:
            wait(firsts, seconds, FIRST_COMPLETED)

    def finish(self) -> None:
        """Wait until everything inside is validated."""
        self.flush()
        wait([chunk.future for queue in self._pending.values() for chunk in queue])

    def drop(self, holds: Callable[[Reading], bool]) -> None:
        """Forget the records of readings that do not hold any more."""
        if self._filling is not None and not holds(self._filling.reading):
            self._forget(self._filling)
            self._filling = None
        for reading in [each for each in self._pending if not holds(each)]:
            for chunk in self._pending.pop(reading):
                chunk.future.cancel()
                self._forget(chunk)

    def close(self) -> None:
        """End; what is inside is given up."""
        self._validators.close()

    def _start(self, chunk: _Chunk) -> None:
        chunk.future = self._validators.submit(chunk.unknown)

    def _forget(self, chunk: _Chunk) -> None:
        self._bytes -= chunk.size
        self._records -= len(chunk.records)
