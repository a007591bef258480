"""The backfill of one image space: which samples it lacks, what is being embedded for it, and what waits to be stored.

The ids of the corpus take about 160 bytes each, and one more for each space.

>>> ids = CorpusIds()
>>> ids.add(["00" * 32, "ff" * 32])
>>> ids.names(ids.numbers(["ff" * 32]))[0][:4]
'ffff'
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from serving.catalog.embedding import CHUNK_ROWS, Embedded, Embedder
from serving.catalog.row_columns import grown
from serving.catalog.tables import Tables

InThread = Callable[..., Awaitable[Any]]
"""Calls a function with its arguments in the one thread that writes tables."""
Numbers = npt.NDArray[np.int64]
LACKING, TAKEN, HELD = 0, 1, 2
QUEUE_ROWS: Final = 8192
"""Missing rows that are looked up at once: a look goes over the whole corpus, 2 ms for a million rows."""
RATE_SECONDS: Final = 60.0
"""The rate of a backfill is that of the last minute."""
STORE_ROWS: Final = 1024
STORE_SECONDS: Final = 2.0
"""Vectors are stored when there are so many of them, when the first one is so old, or when nothing else is missing.
A commit a second costs little, a kill loses two seconds of work, and what is new is found at once."""


class CorpusIds:
    """Sample ids in the order of ingestion. Each has a number, the next one, which no other ever gets."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._names: list[bytes] = []
        self._wanted = np.zeros(0, np.bool_)
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, sample: str) -> bool:
        return bytes.fromhex(sample) in self._numbers

    @property
    def end(self) -> int:
        """All numbers are below this one."""
        return len(self._names)

    @property
    def unreadable(self) -> int:
        """Samples that can never be embedded."""
        return len(self._unreadable)

    def wanted(self) -> npt.NDArray[np.bool_]:
        """By number: true for a sample that is in the corpus and can be embedded. A view that may be written."""
        self._wanted = grown(self._wanted, self.end)
        return self._wanted[: self.end]

    def add(self, samples: Iterable[str]) -> None:
        """Add those that are not there yet, in this order."""
        first = self.end
        for sample in samples:
            name = bytes.fromhex(sample)
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
        self.wanted()[first:] = True

    def remove(self, samples: Iterable[str]) -> None:
        """Take samples out, unreadable ones too; unknown ones are passed over."""
        wanted = self.wanted()
        for sample in samples:
            number = self._numbers.pop(bytes.fromhex(sample), None)
            if number is not None:
                wanted[number] = False
                self._unreadable.discard(number)

    def leave_out(self, samples: Iterable[str]) -> None:
        """Samples of the corpus that can never be embedded."""
        numbers = self.numbers(samples)
        self.wanted()[numbers] = False
        self._unreadable.update(numbers.tolist())

    def numbers(self, samples: Iterable[str]) -> Numbers:
        """Of those samples that are in the corpus."""
        known = (self._numbers.get(bytes.fromhex(sample)) for sample in samples)
        return np.fromiter((number for number in known if number is not None), np.int64)

    def names(self, numbers: Sequence[int] | Numbers) -> list[str]:
        return [self._names[number].hex() for number in numbers]


class SpaceCoverage:
    """Rows of the corpus by number: lacking in the table of one space, being embedded for it, or held by it."""

    def __init__(self, ids: CorpusIds) -> None:
        self._ids = ids
        self._states = np.zeros(0, np.uint8)
        self._queue: deque[int] = deque()

    @property
    def rows(self) -> int:
        """Rows of the corpus that are in the table."""
        return int(np.count_nonzero(self._all() == HELD))

    @property
    def missing(self) -> int:
        """Rows that are not there yet and can be embedded."""
        return int(np.count_nonzero(self._ids.wanted() & (self._all() != HELD)))

    @property
    def ratio(self) -> float:
        """Share of the corpus that is done, 0 to 1; what cannot be embedded counts as done."""
        return min(1.0, (self.rows + self._ids.unreadable) / len(self._ids)) if len(self._ids) else 1.0

    def take(self, count: int) -> Numbers:
        """The next missing rows, the oldest first, marked as being embedded. Empty when none is left."""
        wanted, states = self._ids.wanted(), self._all()
        if not self._queue:
            self._queue.extend(np.flatnonzero(wanted & (states == LACKING))[:QUEUE_ROWS].tolist())
        numbers: list[int] = []
        while self._queue and len(numbers) < count:
            number = self._queue.popleft()
            if wanted[number] and states[number] == LACKING:
                numbers.append(number)
                states[number] = TAKEN
        return np.asarray(numbers, np.int64)

    def prefer(self, numbers: Numbers) -> None:
        """Rows that searches came upon: if they are missing, they are the next ones to take."""
        self._queue.extendleft(numbers.tolist())

    def give_back(self, numbers: Numbers) -> None:
        """Rows that were taken are not being embedded any more, whether they are held by now or not."""
        states = self._all()
        states[numbers[states[numbers] == TAKEN]] = LACKING

    def hold(self, numbers: Numbers) -> None:
        """Rows that are in the table."""
        self._all()[numbers] = HELD

    def holding(self, numbers: Numbers) -> Numbers:
        """Those of some rows that are in the table."""
        held: Numbers = numbers[self._all()[numbers] == HELD]
        return held

    def drop(self, numbers: Numbers) -> None:
        """Rows that left the table."""
        self._all()[numbers] = LACKING

    def held(self) -> Numbers:
        """The numbers of all rows that are in the table, in the order of ingestion."""
        return np.flatnonzero(self._all() == HELD).astype(np.int64)

    def _all(self) -> npt.NDArray[np.uint8]:
        """Of each number, as a view that may be written."""
        self._states = grown(self._states, self._ids.end)
        return self._states[: self._ids.end]


class BackfillRate:
    """Rows a second of one space's backfill, over the last minute in which it ran."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._rows: deque[tuple[float, int]] = deque([(now(), 0)])

    def begin(self) -> None:
        """Rows are being embedded: after a pause, what was before it says nothing of the rate."""
        if self._now() - self._rows[-1][0] > RATE_SECONDS:
            self._rows = deque([(self._now(), 0)])

    def add(self, rows: int) -> None:
        """Rows were embedded and stored."""
        now = self._now()
        self._rows.append((now, rows))
        while len(self._rows) > 2 and now - self._rows[0][0] > RATE_SECONDS:
            self._rows.popleft()

    @property
    def per_second(self) -> float:
        """0 while nothing is known."""
        seconds = self._rows[-1][0] - self._rows[0][0]
        return sum(count for _, count in list(self._rows)[1:]) / seconds if seconds > 0 else 0.0

    def seconds_left(self, missing: int) -> float | None:
        """An estimate; None while nothing is known."""
        rate = self.per_second
        return 0.0 if not missing else missing / rate if rate > 0 else None


class SpaceFill:
    """Brings one space to full coverage. Use from one event loop; let one call to :meth:`store` run at a time."""

    def __init__(self, space: str, clip: str | None, ids: CorpusIds, tables: Tables, in_thread: InThread) -> None:
        self.space = space
        self.clip = clip
        """An adapter that makes vectors of this space."""
        self.complete = -1
        """Version of the corpus whose rows are all in the table; -1: none yet."""
        self.coverage = SpaceCoverage(ids)
        self.rate = BackfillRate()
        self.loaded = False
        self._ids = ids
        self._tables = tables
        self._in_thread = in_thread
        self._running: dict[asyncio.Task[Embedded], Numbers] = {}
        self._finished: list[tuple[Numbers, Embedded]] = []
        self._finished_at = 0.0

    @property
    def running(self) -> set[asyncio.Task[Embedded]]:
        return set(self._running)

    @property
    def is_idle(self) -> bool:
        """True when nothing is being embedded and nothing waits to be stored."""
        return not self._running and not self._finished

    @property
    def is_complete(self) -> bool:
        """True when every row that can be embedded is in the table."""
        return self.loaded and self.is_idle and not self.coverage.missing

    async def load(self) -> None:
        """Learn which rows the table has."""
        stored = await self._in_thread(lambda: [self._ids.numbers(ids) for ids in self._tables.id_batches(self.space)])
        for numbers in stored:
            self.coverage.hold(numbers)
        self.loaded = True

    def start(self, embedder: Embedder) -> bool:
        """Begin to embed the next chunk. False when nothing is missing that is not being embedded."""
        numbers = self.coverage.take(CHUNK_ROWS)
        if not len(numbers):
            return False
        self.rate.begin()
        task = asyncio.get_running_loop().create_task(self._embed(embedder, self._ids.names(numbers)))
        self._running[task] = numbers
        return True

    def collect(self) -> list[BaseException]:
        """Take over the chunks that are done. Returns why others failed, which are missing again."""
        errors: list[BaseException] = []
        for task in [task for task in self._running if task.done()]:
            numbers = self._running.pop(task)
            if task.cancelled() or (error := task.exception()) is not None:
                self.coverage.give_back(numbers)
                errors += [] if task.cancelled() or error is None else [error]
                continue
            if not self._finished:
                self._finished_at = time.monotonic()
            self._finished.append((numbers, task.result()))
        return errors

    def is_due(self) -> bool:
        rows = sum(len(numbers) for numbers, _ in self._finished)
        late = time.monotonic() - self._finished_at > STORE_SECONDS
        last = not self._running and self.coverage.missing <= rows
        return bool(self._finished) and (rows >= STORE_ROWS or late or last)

    async def store(self) -> pa.Table | None:
        """Add what is embedded to the table, in one commit. Returns the rows that were added (or were there)."""
        finished, self._finished = self._finished, []
        try:
            return await self._store(finished)
        finally:
            for numbers, _ in finished:
                self.coverage.give_back(numbers)

    def cancel(self) -> None:
        """Stop what is being embedded; nothing more is stored."""
        for task in self._running:
            task.cancel()
        self._finished = []

    def status(self) -> dict[str, Any]:
        """Rows, coverage from 0 to 1, and how the backfill gets on."""
        missing = self.coverage.missing
        return {
            "rows": self.coverage.rows,
            "coverage": self.coverage.ratio,
            "missing": missing,
            "rows_per_second": self.rate.per_second if missing else 0.0,
            "seconds_left": self.rate.seconds_left(missing),
        }

    async def _embed(self, embedder: Embedder, samples: list[str]) -> Embedded:
        present = await self._in_thread(self._tables.present, self.space, samples)  # by the catalog of another server
        absent = [sample for sample in samples if sample not in present]
        embedded = await embedder.embed(absent, self.clip)
        return Embedded(embedded.rows, embedded.vectors, embedded.unreadable, frozenset(present))

    async def _store(self, finished: list[tuple[Numbers, Embedded]]) -> pa.Table | None:
        parts, vectors = [], []
        for numbers, embedded in finished:
            names = set(self._ids.names(numbers[self._ids.wanted()[numbers]]))  # others were deleted meanwhile
            self._ids.leave_out(names.intersection(embedded.unreadable))
            self.coverage.hold(self._ids.numbers(names & embedded.present))
            here = [index for index, name in enumerate(embedded.rows["id"].to_pylist()) if name in names]
            if here:
                parts.append(embedded.rows.take(here))
                vectors.append(embedded.vectors[here])
        if not parts:
            return None
        rows = pa.concat_tables(parts)
        await self._in_thread(self._tables.merge, self.space, rows, np.concatenate(vectors))
        self.coverage.hold(self._ids.numbers(rows["id"].to_pylist()))
        self.rate.add(len(rows))
        return rows
