"""Cheap pairs: distinct small JPEGs with captions of several lengths."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks.stream.filling import RowMaker, sample_table
from core.digests import digest_bytes
from streams.store.rows import Tally, words_hash

SIDE = 32
CELLS = 4
COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "violet")
SHAPES = ("square", "circle", "ring", "cross", "arrow", "star", "line", "letter")
PLACES = ("", " on a wall", " under a tree in the rain", ", seen from above", ", half hidden behind a grey box")


def pair_rows(fresh_share: float) -> RowMaker:
    """Makes rows as ingest stores them; the ID decides which share is kept for the gate."""

    def make(stream: str, first: int, end: int) -> tuple[pa.Table, Tally]:
        numbers = range(first, end)
        images = [_picture(number) for number in numbers]
        texts = [_caption(number) for number in numbers]
        ids = [digest_bytes(image, text.encode()) for image, text in zip(images, texts, strict=True)]
        splits = ["fresh_eval" if int(each[:8], 16) < fresh_share * 2**32 else "train" for each in ids]
        columns: dict[str, Sequence[Any]] = {
            "id": ids, "image": images, "text": texts, "split": splits, "offset": list(numbers),
            "size": [len(image) for image in images],
            "domain": [SHAPES[number % len(SHAPES)] for number in numbers],
            "concept": [f"{COLOURS[number // 8 % 8]} {SHAPES[number % 8]}" for number in numbers],
            "words": [words_hash(text, "", "") for text in texts],
        }  # fmt: skip
        tally: Tally = Counter(sample=len(numbers), bytes=sum(map(len, images)))
        for split, rows in Counter(splits).items():
            tally[split] += rows
            tally[f"{split}/text"] += rows
        return sample_table(stream, columns), tally

    return make


def _picture(number: int) -> bytes:
    cells = np.random.default_rng(number).integers(0, 256, (CELLS, CELLS, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(cells).resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(out, "JPEG", quality=80)
    return out.getvalue()


def _caption(number: int) -> str:
    place = PLACES[number // 64 % len(PLACES)]
    return f"a {COLOURS[number // 8 % 8]} {SHAPES[number % 8]}{place}, number {number}"
