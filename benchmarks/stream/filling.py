"""Filling a store with cheap samples, and maintaining it as a running installation would."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from core.progress import track
from core.settings import Settings
from streams.store.maintenance import Maintainer
from streams.store.rows import SCHEMA, Position, SampleTable, Tally, words_hash
from streams.store.writer import StoreWriter

COMMIT_ROWS = 50_000
STREAM = "filled"
MAINTENANCE_RUNS = 8
"""More rounds than any state of the store needs to settle."""


RowMaker = Callable[[str, int, int], tuple[pa.Table, Tally]]
"""Rows of samples of a stream, from a number to another, and their tally."""


def fill(lake: str, count: int, start: int, make: RowMaker | None = None) -> None:
    """Store samples number ``start`` to ``count``, with images of a few hundred bytes, in large commits. ``make``:
    makes the rows; by default :func:`sample_rows`.
    """
    make = make or sample_rows
    writer = StoreWriter(SampleTable(lake))
    [claim] = writer.claim([Position(STREAM, 0, start)])
    pieces = [(first, min(first + COMMIT_ROWS, count)) for first in range(start, count, COMMIT_ROWS)]
    for first, end in track(pieces, "filling the store"):
        rows, tally = make(STREAM, first, end)
        position = claim.position
        writer.commit(rows, [(claim, replace(position, next=end, published=end, tally=position.tally + tally))])


def settle(settings: Settings) -> None:
    maintainer = Maintainer(settings)
    store = maintainer.store
    try:
        for _ in range(MAINTENANCE_RUNS):
            before = store.version()
            maintainer.run_once()
            if store.version() == before:
                return
    finally:
        maintainer.close()


def _small_jpeg() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).resize((32, 32)).save(out, "JPEG", quality=60)
    return out.getvalue()


def sample_rows(stream: str, first: int, end: int, image_bytes: int = 0) -> tuple[pa.Table, Tally]:
    """Rows of samples number ``first`` to ``end``, and their tally.

    All have the same image with different trailing bytes, of ``image_bytes`` or as short as possible: what follows an
    image's end marker is not decoded, but counts for its ID.
    """
    numbers, jpeg = range(first, end), _small_jpeg()
    images = [jpeg + os.urandom(max(16, image_bytes - len(jpeg))) for _ in numbers]
    count = end - first
    columns: dict[str, Sequence[Any]] = {
        "id": [hashlib.sha256(image).hexdigest() for image in images],
        "image": images,
        "size": [len(image) for image in images],
        "text": (texts := [f"picture {number}" for number in numbers]),
        "words": [words_hash(text, "", "") for text in texts],
        "look": [os.urandom(35) for _ in numbers],
        "offset": list(numbers),
    }
    size = sum(map(len, images))
    tally = Counter({"sample": count, "train": count, "train/text": count, "bytes": size})
    return sample_table(stream, columns), tally


def sample_table(stream: str, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Rows of samples of 32 x 32 pixels with these columns; the others are the same in all rows."""
    now, count = datetime.now(UTC), len(columns["id"])
    constants = {
        "kind": "sample", "question": "", "answer": "", "domain": "", "source": "bench", "concept": "", "label": "",
        "tags": [], "extra": "", "time": now, "ingested_at": now, "split": "train", "width": 32, "height": 32,
        "topic": stream, "partition": 0,
    }  # fmt: skip
    filled = {**{name: [value] * count for name, value in constants.items()}, **columns}
    arrays = [pa.array(filled.get(each.name, [None] * count), each.type) for each in SCHEMA]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
