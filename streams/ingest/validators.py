"""Parallel validation of records in processes or threads, with results in the order of each partition. Threads decode
images in parallel, but share the GIL; processes do not, and a record that kills a validating process does not kill the
consumer.

**A record that kills the process** is quarantined after the third death. A file names the records being validated; it
is memory-mapped, so its content survives the process (not the machine). Each death is counted for all records in the
file: by the consumer if one of its processes died, by the next consumer if the consumer itself did. A record with a
death is validated alone from then on, so that no other is blamed for it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from core.child_process import end_with_parent, kill_workers
from core.errors import StoreFull, StoreUnavailable
from core.files import replace_file
from core.logs import LogConfig, inherit, inherited
from core.settings.streams import Ingest, Kafka
from streams.ingest.membership import PartitionReader
from streams.ingest.validate import Accepted, Received, Rules, StoreRow, quarantine_row, validate
from streams.records.registry import SchemaRegistry
from streams.records.uris import FETCHES, UriFetcher
from streams.store.rows import RecordPosition, name_of

CHUNK_RECORDS: Final = 8
CHUNK_BYTES: Final = 256 << 10
"""Records are passed in chunks: each transfer takes some 50 us, a tenth of the time for a small image."""
DEATHS: Final = 3
SLOT_BYTES: Final = 512
"""Topic names have at most 249 characters."""
Result = Accepted | StoreRow


@dataclass(frozen=True, slots=True)
class Validated:
    reading: PartitionReader
    end: int
    leader_epoch: int
    size: int
    result: Result


@dataclass(slots=True)
class _Chunk:
    reading: PartitionReader
    records: list[tuple[Received, int, StoreRow | None]] = field(default_factory=list)
    size: int = 0
    future: Future[list[Result]] = field(default_factory=Future)

    @property
    def unknown(self) -> list[Received]:
        return [received for received, _, known in self.records if known is None]


class ValidationPool:
    def __init__(self, validators: Validators, max_bytes: int, max_records: int) -> None:
        """``max_bytes`` and ``max_records`` bound the pool's records: see :attr:`has_room`."""
        self._validators = validators
        self._max_bytes = max_bytes
        self._max_records = max_records
        self._pending: dict[PartitionReader, deque[_Chunk]] = {}
        self._filling: _Chunk | None = None
        self._bytes = 0
        self._records = 0

    def __len__(self) -> int:
        return self._records

    @property
    def has_room(self) -> bool:
        return self._bytes < self._max_bytes and self._records < self._max_records

    def add(
        self, reading: PartitionReader, received: Received, leader_epoch: int, result: StoreRow | None = None
    ) -> None:
        """Add a record, perhaps with its result. It is validated after :meth:`flush`, or when a chunk is full."""
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
        chunk, self._filling = self._filling, None
        if chunk is not None:
            chunk.future = self._validators.submit(chunk.unknown)
            self._pending.setdefault(chunk.reading, deque()).append(chunk)

    def take(self) -> list[Validated]:
        """The next results of some partition, in order; empty if none are ready. Raises RatchetError in an outage; the
        records stay the next of their partition, and are validated again."""
        ready = next((queue for queue in self._pending.values() if queue[0].future.done()), None)
        if ready is None:
            return []
        chunk = ready[0]
        try:
            results = chunk.future.result()
        except BrokenProcessPool:
            results = [self._validators.alone(received) for received in chunk.unknown]
        except BaseException:
            chunk.future = self._validators.submit(chunk.unknown)
            raise
        ready.popleft()
        if not ready:
            del self._pending[chunk.reading]
        self._forget(chunk)
        fresh = iter(results)
        return [
            Validated(chunk.reading, record.offset + 1, epoch, record.size, known or _restore(record, next(fresh)))
            for record, epoch, known in chunk.records
        ]

    def wait(self, seconds: float) -> None:
        if self._pending:
            wait([queue[0].future for queue in self._pending.values()], seconds, FIRST_COMPLETED)

    def finish(self) -> None:
        self.flush()
        wait([chunk.future for queue in self._pending.values() for chunk in queue])

    def drop(self, holds: Callable[[PartitionReader], bool]) -> None:
        if self._filling is not None and not holds(self._filling.reading):
            self._forget(self._filling)
            self._filling = None
        for reading in [each for each in self._pending if not holds(each)]:
            for chunk in self._pending.pop(reading):
                chunk.future.cancel()
                self._forget(chunk)

    def close(self) -> None:
        self._validators.close()

    def _forget(self, chunk: _Chunk) -> None:
        self._bytes -= chunk.size
        self._records -= len(chunk.records)


# -- processes and threads ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ValidationSetup:
    limits: Ingest
    kafka: Kafka
    key: bytes = b""

    @property
    def threads(self) -> int:
        """Threads per process: more than one only if it waits for images to be fetched."""
        return FETCHES if self.limits.allowed_uris else 1

    def rules(self) -> Rules:
        fetcher, registry = UriFetcher(self.limits), SchemaRegistry.of(self.kafka)

        def end() -> None:
            fetcher.close()
            if registry is not None:
                registry.close()

        return Rules(self.limits, fetcher.fetch, registry, end, self.kafka, self.key)


def start_validators(work: ValidationSetup, processes: int, folder: Path) -> tuple[CrashGuard, Validators]:
    """Start ``processes`` validators; 0: threads of this process. Raises StoreUnavailable."""
    slots = processes * work.threads if processes else (os.cpu_count() or 1) + work.threads - 1
    guard = CrashGuard(folder, slots)
    return guard, ProcessValidators(work, processes, guard) if processes else ThreadValidators(work, slots, guard)


class ProcessValidators:
    def __init__(self, work: ValidationSetup, count: int, guard: CrashGuard) -> None:
        """``guard`` has slots for ``count`` processes of :attr:`ValidationSetup.threads` each."""
        self._work = work
        self._count = count
        self._guard = guard
        self._begin()

    def submit(self, records: Sequence[Received]) -> Future[list[Result]]:
        """Validate records. The future raises BrokenProcessPool if a process dies meanwhile."""
        try:
            return self._pool.submit(validate_all, records)
        except BrokenProcessPool:
            self._count_deaths()
            self._begin()
            return self._pool.submit(validate_all, records)

    def alone(self, received: Received) -> Result:
        """Validate a record while no other is: if a process dies again, this record killed it. Blocks."""
        self._count_deaths()
        while not self._guard.is_poison(received.record_position):
            deaths = self._guard.deaths(received.record_position)
            try:
                return self.submit([received]).result()[0]
            except BrokenProcessPool:
                self._count_deaths()
                self._begin()
                if self._guard.deaths(received.record_position) == deaths:
                    self._guard.count([name_of(received.record_position)])  # it died before it could note the record
        return crashed(received, self._guard)

    def close(self) -> None:
        """Kill the processes immediately. Their notes do not count as deaths: the guard is emptied afterwards."""
        kill_workers(self._pool)

    def _count_deaths(self) -> None:
        if self._pool._broken:
            self._pool.shutdown(wait=True, cancel_futures=True)  # ends the others as well
            self._guard.count(self._guard.notes.take())

    def _begin(self) -> None:
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # one per core: more threads would wait for each other
        # Spawn: a fork of a process with threads (Kafka's, Lance's) can inherit a lock that is never released.
        context = get_context("spawn")
        arguments = (self._work, self._guard.path, context.Value("i", 0), inherited())
        self._pool = ProcessPoolExecutor(self._count, context, _begin, arguments)
        for _ in range(self._count):  # start them now, not with the first records: the pool starts a process per
            self._pool.submit(validate_all, ())  # submission while none is idle


class ThreadValidators:
    """Validates on threads of this process, which share its GIL: about half as fast as processes."""

    def __init__(self, work: ValidationSetup, count: int, guard: CrashGuard) -> None:
        self._notes = guard.notes
        self._rules = work.rules()
        self._threads = ThreadPoolExecutor(count, "validate")

    def submit(self, records: Sequence[Received]) -> Future[list[Result]]:
        return self._threads.submit(lambda: [self.alone(received) for received in records])

    def alone(self, received: Received) -> Result:
        with self._notes.validating(received.record_position):
            return validate(received, self._rules)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._rules.end()


Validators = ProcessValidators | ThreadValidators

_rules: Rules
_notes: Notes
_threads: ThreadPoolExecutor | None = None


def _begin(work: ValidationSetup, path: Path, started: Any, log: LogConfig | None) -> None:
    """Initialize a validating process. ``started``: shared count of the processes started before."""
    global _rules, _notes, _threads
    inherit(log)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the consumer, which stores what was validated
    end_with_parent()
    _rules = work.rules()
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    _notes = Notes.of_process(path, number, work.threads)
    if work.threads > 1:
        _threads = ThreadPoolExecutor(work.threads, "validate")


def validate_all(records: Sequence[Received]) -> list[Result]:
    """Validate records in a process, fetching referenced images in parallel. Images that are the record's own value are
    left out of the row: the consumer has them."""
    results = _threads.map(_validate, records) if _threads is not None else map(_validate, records)
    return list(results)


def _validate(received: Received) -> Result:
    with _notes.validating(received.record_position):
        result = validate(received, _rules)
    if not isinstance(result, Accepted):
        return {**result, "original": None} if result.get("original") is received.value else result
    row = {**result.row, "image": None} if result.row["image"] is received.value else result.row
    return replace(result, row=row, record=None)


def _restore(received: Received, result: Result) -> Result:
    if isinstance(result, Accepted):
        row = result.row if result.row["image"] is not None else {**result.row, "image": received.value}
        return replace(result, row=row, record=received)
    if result["kind"] == "quarantine":
        return {**result, "original": received.value}
    return result


# -- records that kill the process --------------------------------------------------------------------------------


def crashed(received: Received, guard: CrashGuard) -> StoreRow:
    deaths = guard.deaths(received.record_position)
    return quarantine_row(received, "crashed", f"a process died {deaths} times while it validated this record.")


class Notes:
    """Slots of a mapped file that name the records being validated. Thread safe."""

    def __init__(self, content: mmap.mmap, slots: Iterable[int]) -> None:
        self._content = content
        self._lock = threading.Lock()
        self._free = list(slots)
        self._closed = False

    @classmethod
    def of_process(cls, path: Path, number: int, threads: int) -> Notes:
        with path.open("r+b") as file:
            return cls(mmap.mmap(file.fileno(), 0), range(number * threads, (number + 1) * threads))

    @contextmanager
    def validating(self, position: RecordPosition) -> Iterator[None]:
        with self._lock:
            slot = self._free.pop()
        self._write(slot, name_of(position).encode())
        try:
            yield
        finally:
            self._write(slot, b"")
            with self._lock:
                self._free.append(slot)

    def take(self) -> list[str]:
        with self._lock:
            named = _named(self._content[:])
            self._content[:] = bytes(len(self._content))
        return named

    def close(self) -> None:
        """Empty the slots: records still being validated at a stop killed nothing."""
        with self._lock:
            self._closed = True
            self._content[:] = bytes(len(self._content))
            self._content.close()

    def _write(self, slot: int, text: bytes) -> None:
        with self._lock:
            if not self._closed:
                self._content[slot * SLOT_BYTES : (slot + 1) * SLOT_BYTES] = text[:SLOT_BYTES].ljust(SLOT_BYTES, b"\0")


class CrashGuard:
    """Counts the process deaths of each record. Thread safe."""

    def __init__(self, folder: Path, slots: int) -> None:
        """Raises StoreUnavailable if the folder cannot be written. It is shared by this installation's consumers on
        this machine, which take over from each other. ``slots``: most records validated at once."""
        self._counts_file = folder / "crashes.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file, self.path = _lock_file(folder)
            try:
                self._counts = _load(self._counts_file)
                if left := _named(os.pread(self._file, os.fstat(self._file).st_size, 0)):  # left by its dead owner
                    self._counts.update(left)
                    self._save()
                os.ftruncate(self._file, 0)
                os.posix_fallocate(self._file, 0, slots * SLOT_BYTES)  # otherwise a write on a full disk is a SIGBUS
                self.notes = Notes(mmap.mmap(self._file, slots * SLOT_BYTES), range(slots))
            except OSError:
                os.close(self._file)
                raise
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull(f"the disk of the folder {folder} is full.", "Free space; nothing is lost.") from error
            raise StoreUnavailable(f"the folder {folder} cannot be written: {error}.", "Check `home`.") from error

    def deaths(self, position: RecordPosition) -> int:
        return self._counts[name_of(position)]

    def is_poison(self, position: RecordPosition) -> bool:
        return self.deaths(position) >= DEATHS

    def count(self, names: Sequence[str]) -> None:
        self._counts.update(names)
        with suppress(OSError):  # a full disk: saved with the next death
            self._save()

    def forget(self, positions: Iterable[RecordPosition]) -> None:
        """Drop the counts of stored records, which are not validated again."""
        if self._counts and (known := [key for key in map(name_of, positions) if key in self._counts]):
            for key in known:
                del self._counts[key]
            with suppress(OSError):
                self._save()

    def close(self) -> None:
        self.notes.close()
        os.close(self._file)

    def _save(self) -> None:
        replace_file(self._counts_file, json.dumps(self._counts).encode())


def _lock_file(folder: Path) -> tuple[int, Path]:
    number = 0
    while True:
        path = folder / f"validating-{number}"
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file, path
        except BlockingIOError:
            os.close(file)
            number += 1


def _named(content: bytes) -> list[str]:
    slots = (content[start : start + SLOT_BYTES] for start in range(0, len(content), SLOT_BYTES))
    return [text for slot in slots if (text := slot.rstrip(b"\0").decode(errors="replace"))]


def _load(path: Path) -> Counter[str]:
    try:
        return Counter({str(key): int(count) for key, count in json.loads(path.read_text()).items()})
    except (OSError, ValueError, AttributeError):
        return Counter()
