"""The backfill of one image space: missing samples, samples being embedded, and vectors to store. Several chunks are
embedded at once over all encoder replicas. Corpus IDs take about 160 bytes each, plus one byte per space."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from core.errors import RecordError
from core.priority import nice_thread
from serving.catalog.row_columns import LABELS, grown
from serving.catalog.tables import Tables
from streams.store.sample_store import SampleStore

log = logging.getLogger("ratchet.catalog")
InThread = Callable[..., Awaitable[Any]]
"""Calls a function with its arguments in the single thread that writes tables."""
Numbers = npt.NDArray[np.int64]
LACKING, TAKEN, HELD = 0, 1, 2
QUEUE_ROWS: Final = 8192
"""Missing rows looked up at once: each look scans the whole corpus, 2 ms for a million rows."""
RATE_SECONDS: Final = 60.0
STORE_ROWS: Final = 1024
STORE_SECONDS: Final = 2.0
"""Vectors are stored when there are this many, when the first is this old, or when nothing else is missing. One commit
a second costs little, a kill loses two seconds of work, and new rows are found at once."""
_COLUMNS: Final = ["id", "image", "domain", "source", "time", "ingested_at", "text", "question", "answer", *LABELS]
CHUNK_ROWS: Final = 32
"""Rows of one background call: 0.4 s of encoding at 12 ms an image, and 5 MB of pixels."""
SLOWER: Final = 2.0
"""A chunk slower than the fastest one by this factor waits for requests or other chunks."""
REMEMBERED: Final = 64
"""Recent chunks among which the fastest is taken: other load on the machine changes."""

Pixels = Callable[[bytes], npt.NDArray[np.uint8]]
"""Encoded image to uint8 [S, S, 3]. Raises RecordError for one that can never be embedded."""
Encode = Callable[[npt.NDArray[np.uint8], str | None], Awaitable[npt.NDArray[np.float32]]]
"""uint8 [n, S, S, 3] and an adapter to float32 [n, dim]."""


class CorpusIds:
    """Sample IDs in order of ingestion. Numbers are consecutive and never reused."""

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
        """Number of samples that can never be embedded."""
        return len(self._unreadable)

    def wanted(self) -> npt.NDArray[np.bool_]:
        """By number: true if the sample is in the corpus and can be embedded. A writable view."""
        self._wanted = grown(self._wanted, self.end)
        return self._wanted[: self.end]

    def add(self, samples: Iterable[str]) -> None:
        """Add unknown samples, in this order."""
        first = self.end
        for sample in samples:
            name = bytes.fromhex(sample)
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
        self.wanted()[first:] = True

    def remove(self, samples: Iterable[str]) -> None:
        """Remove samples, unreadable ones too; unknown ones are ignored."""
        wanted = self.wanted()
        for sample in samples:
            number = self._numbers.pop(bytes.fromhex(sample), None)
            if number is not None:
                wanted[number] = False
                self._unreadable.discard(number)

    def leave_out(self, samples: Iterable[str]) -> None:
        numbers = self.numbers(samples)
        self.wanted()[numbers] = False
        self._unreadable.update(numbers.tolist())

    def numbers(self, samples: Iterable[str]) -> Numbers:
        """Numbers of the samples that are in the corpus."""
        known = (self._numbers.get(bytes.fromhex(sample)) for sample in samples)
        return np.fromiter((number for number in known if number is not None), np.int64)

    def names(self, numbers: Sequence[int] | Numbers) -> list[str]:
        return [self._names[number].hex() for number in numbers]


class SpaceCoverage:
    """State of each corpus row in one space's table: lacking, taken for embedding, or held."""

    def __init__(self, ids: CorpusIds) -> None:
        self._ids = ids
        self._states = np.zeros(0, np.uint8)
        self._queue: deque[int] = deque()

    @property
    def rows(self) -> int:
        return int(np.count_nonzero(self._all() == HELD))

    @property
    def missing(self) -> int:
        """Number of embeddable rows that are not in the table."""
        return int(np.count_nonzero(self._ids.wanted() & (self._all() != HELD)))

    @property
    def ratio(self) -> float:
        """Share of the corpus that is done, 0 to 1; what cannot be embedded counts as done."""
        return min(1.0, (self.rows + self._ids.unreadable) / len(self._ids)) if len(self._ids) else 1.0

    def take(self, count: int) -> Numbers:
        """Take the next missing rows, oldest first, for embedding. Empty if none is left."""
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
        self._queue.extendleft(numbers.tolist())

    def give_back(self, numbers: Numbers) -> None:
        """Mark rows as no longer being embedded; held rows stay held."""
        states = self._all()
        states[numbers[states[numbers] == TAKEN]] = LACKING

    def hold(self, numbers: Numbers) -> None:
        self._all()[numbers] = HELD

    def holding(self, numbers: Numbers) -> Numbers:
        held: Numbers = numbers[self._all()[numbers] == HELD]
        return held

    def drop(self, numbers: Numbers) -> None:
        self._all()[numbers] = LACKING

    def held(self) -> Numbers:
        return np.flatnonzero(self._all() == HELD).astype(np.int64)

    def _all(self) -> npt.NDArray[np.uint8]:
        """States by number, a writable view."""
        self._states = grown(self._states, self._ids.end)
        return self._states[: self._ids.end]


class BackfillRate:
    """Rows per second of a space's backfill, over the last minute in which it ran."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._rows: deque[tuple[float, int]] = deque([(now(), 0)])

    def begin(self) -> None:
        """Note the start of embedding; resets the rate after a pause."""
        if self._now() - self._rows[-1][0] > RATE_SECONDS:
            self._rows = deque([(self._now(), 0)])

    def add(self, rows: int) -> None:
        now = self._now()
        self._rows.append((now, rows))
        while len(self._rows) > 2 and now - self._rows[0][0] > RATE_SECONDS:
            self._rows.popleft()

    @property
    def per_second(self) -> float:
        """0 while unknown."""
        seconds = self._rows[-1][0] - self._rows[0][0]
        return sum(count for _, count in list(self._rows)[1:]) / seconds if seconds > 0 else 0.0

    def seconds_left(self, missing: int) -> float | None:
        rate = self.per_second
        return 0.0 if not missing else missing / rate if rate > 0 else None


class SpaceFill:
    """Fills one space. Use from one event loop, with one call of :meth:`store` at a time."""

    def __init__(self, space: str, clip: str | None, ids: CorpusIds, tables: Tables, in_thread: InThread) -> None:
        self.space = space
        self.clip = clip
        """Adapter whose vectors are in this space."""
        self.complete = -1
        """Corpus version whose rows are all in the table; -1: none yet."""
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
        return not self._running and not self._finished

    @property
    def is_complete(self) -> bool:
        """True if every embeddable row is in the table."""
        return self.loaded and self.is_idle and not self.coverage.missing

    async def load(self) -> None:
        stored = await self._in_thread(lambda: [self._ids.numbers(ids) for ids in self._tables.id_batches(self.space)])
        for numbers in stored:
            self.coverage.hold(numbers)
        self.loaded = True

    def start(self, embedder: Embedder) -> bool:
        """Start embedding the next chunk. False if no row is left to take."""
        numbers = self.coverage.take(CHUNK_ROWS)
        if not len(numbers):
            return False
        self.rate.begin()
        task = asyncio.get_running_loop().create_task(self._embed(embedder, self._ids.names(numbers)))
        self._running[task] = numbers
        return True

    def collect(self) -> list[BaseException]:
        """Collect finished chunks. Returns errors of failed ones, whose rows are missing again."""
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
        """Add embedded rows to the table in one commit. Returns the rows that were added or already there."""
        finished, self._finished = self._finished, []
        try:
            return await self._store(finished)
        finally:
            for numbers, _ in finished:
                self.coverage.give_back(numbers)

    def cancel(self) -> None:
        """Cancel embedding and drop what is not stored."""
        for task in self._running:
            task.cancel()
        self._finished = []

    def status(self) -> dict[str, Any]:
        missing = self.coverage.missing
        return {
            "rows": self.coverage.rows,
            "coverage": self.coverage.ratio,
            "missing": missing,
            "rows_per_second": self.rate.per_second if missing else 0.0,
            "seconds_left": self.rate.seconds_left(missing),
        }

    async def _embed(self, embedder: Embedder, samples: list[str]) -> Embedded:
        present = await self._in_thread(self._tables.present, self.space, samples)  # another server's
        absent = [sample for sample in samples if sample not in present]
        return replace(await embedder.embed(absent, self.clip), present=frozenset(present))

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


def _with_text(rows: pa.Table) -> pa.Table:
    """Rows whose ``text`` falls back to question and answer."""
    parts = rows.select(["text", "question", "answer"]).to_pylist()
    texts = [row["text"] or " ".join(filter(None, (row["question"], row["answer"]))) for row in parts]
    return rows.set_column(rows.schema.get_field_index("text"), "text", pa.array(texts, pa.string()))


@dataclass(frozen=True, slots=True)
class Embedded:
    rows: pa.Table
    vectors: npt.NDArray[np.float32]
    unreadable: tuple[str, ...] = ()
    """Samples that can never be embedded."""
    present: frozenset[str] = frozenset()


class Pace:
    """The number of concurrent chunks, by additive increase and multiplicative decrease (Chiu and Jain 1989): one more
    after each full set of chunks about as fast as the fastest, half as many after a much slower one."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._width = 1.0
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    @property
    def width(self) -> int:
        return int(self._width)

    def ended(self, rows: int, seconds: float) -> None:
        each = seconds / max(1, rows)
        self._seconds.append(each)
        if each > SLOWER * min(self._seconds):
            self._width = max(1.0, self._width / 2)
        else:
            self._width = min(float(self._most), self._width + 1 / self._width)


class Embedder:
    """Reads, decodes and encodes chunks. Use from one event loop."""

    def __init__(self, corpus: SampleStore, pixels: Pixels, encode: Encode) -> None:
        self.pace = Pace(most=16)
        self.encode = encode
        self._corpus = corpus
        self._pixels = pixels
        self._threads = ThreadPoolExecutor(2, "catalog-decode", nice_thread, (10,))  # requests come first

    async def embed(self, samples: Sequence[str], clip: str | None) -> Embedded:
        """Embed samples under an adapter; deleted ones count as unreadable. Raises whatever ``encode`` raises."""
        loop = asyncio.get_running_loop()
        rows, pixels, unreadable = await loop.run_in_executor(self._threads, self._read, list(samples))
        if not pixels:
            return Embedded(rows, np.empty((0, 0), np.float32), unreadable)
        began = time.monotonic()
        vectors = await self.encode(np.stack(pixels), clip)
        self.pace.ended(len(pixels), time.monotonic() - began)
        return Embedded(rows, vectors, unreadable)

    def _read(self, samples: list[str]) -> tuple[pa.Table, list[npt.NDArray[np.uint8]], tuple[str, ...]]:
        rows = self._corpus.scan(columns=_COLUMNS, ids=samples)
        good: list[int] = []
        pixels: list[npt.NDArray[np.uint8]] = []
        seen: set[str] = set()
        for index, (sample, image) in enumerate(zip(rows["id"].to_pylist(), rows["image"], strict=True)):
            if sample in seen:
                continue  # workers without a common index may store the same content twice
            try:
                pixels.append(self._pixels(bytes(image.as_py())))
            except RecordError as error:  # ingest accepted it under other limits
                log.warning("sample %s is left out of the catalog: %s", sample, error)
                continue
            seen.add(sample)
            good.append(index)
        taken = _with_text(rows.take(pa.array(good, pa.int64())).drop_columns(["image"]))
        return taken, pixels, tuple(sample for sample in samples if sample not in seen)
