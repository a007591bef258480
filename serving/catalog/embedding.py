"""Samples to vectors: several chunks at once over all encoder replicas, as fast as serving leaves room for."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from core.errors import RecordError
from core.priority import nice_thread
from streams.store.sample_store import SampleStore

_COLUMNS: Final = ["id", "image", "domain", "source", "time", "ingested_at", "text", "question", "answer"]
log = logging.getLogger("ratchet.catalog")
CHUNK_ROWS: Final = 32
"""Rows of one background call: 0.4 s of encoding at 12 ms an image, and 5 MB of pixels."""
MOST_CHUNKS: Final = 16
DECODING_THREADS: Final = 2
DECODING_NICE: Final = 10
"""Requests come first."""
SLOWER: Final = 2.0
"""A chunk slower than the fastest one by this factor waits for requests or other chunks."""
REMEMBERED: Final = 64
"""Recent chunks among which the fastest is taken: other load on the machine changes."""

Pixels = Callable[[bytes], npt.NDArray[np.uint8]]
"""Encoded image to uint8 [S, S, 3]. Raises RecordError for one that can never be embedded."""
Encode = Callable[[npt.NDArray[np.uint8], str | None], Awaitable[npt.NDArray[np.float32]]]
"""uint8 [n, S, S, 3] and an adapter to float32 [n, dim]."""


def _with_text(rows: pa.Table) -> pa.Table:
    """Rows whose ``text`` falls back to question and answer."""
    texts = [
        text or " ".join(part for part in (question, answer) if part)
        for text, question, answer in zip(
            rows["text"].to_pylist(), rows["question"].to_pylist(), rows["answer"].to_pylist(), strict=True
        )
    ]
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
    after each full set of chunks about as fast as the fastest, half as many after a much slower one. A busy server, or
    more chunks than replicas, slows chunks down."""

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
        self.pace = Pace(MOST_CHUNKS)
        self.encode = encode
        self._corpus = corpus
        self._pixels = pixels
        self._threads = ThreadPoolExecutor(
            DECODING_THREADS, "catalog-decode", initializer=nice_thread, initargs=(DECODING_NICE,)
        )

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
