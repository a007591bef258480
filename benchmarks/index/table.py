"""The user's table that :mod:`benchmarks.index.run_index` measures: :class:`Table`, with what all stores share."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
from PIL import Image

from core.ledger.rows import IndexRow
from core.settings import Settings
from serving.engines.clip import ClipEngine
from serving.engines.clip_base import load_base
from serving.indexes.store import Vector
from serving.indexes.worker import PAGE_ROWS

WRITE_PAUSE: Final = 0.5
SEARCH_PAUSE: Final = 0.1
NEIGHBOURS: Final = 10
SAME: Final = 0.999
"""Cosine from which two vectors are of one image in one space: of two spaces, or two images, they are far below."""


def picture(seed: int) -> bytes:
    """A picture that no other seed gives, 128 x 128."""
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((128, 128), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def random_row(chance: np.random.Generator, rows: int) -> tuple[int, bytes]:
    """ID and image of a row to change, or in one of eleven cases to add."""
    return int(chance.integers(rows * 11 // 10)), picture(int(chance.integers(1 << 40, 1 << 41)))


class Encoder:
    """The base and an adapter, by image space: what ``/v1/embeddings`` answers to a pinned ``space``."""

    def __init__(self, settings: Settings, adapter: str) -> None:
        """``adapter``: made by :func:`benchmarks.swap.make_adapters`, the first."""
        self.adapter = adapter
        self.engine = ClipEngine.of(settings, load_base(settings.home, settings.base.clip))
        self.engine.load(adapter, settings.home / "random" / "0")
        self.clips: dict[str, str | None] = {self.engine.spaces(clip).image: clip for clip in (None, adapter)}

    def __call__(self, images: Sequence[bytes], space: str) -> Vector:
        """Vectors [n, dim]."""
        pixels = self.engine.base.preprocess.pixels
        parts = (images[at : at + PAGE_ROWS] for at in range(0, len(images), PAGE_ROWS))
        return np.concatenate([
            self.engine.encode_images(np.stack([pixels(image) for image in part]), self.clips[space]) for part in parts
        ])  # fmt: skip

    def is_mixed(self, image: bytes, vector: Vector, spaces: set[str], space: str) -> bool:
        """Judge an answer by its nearest row, an image with its vector, and by the spaces of all rows."""
        return bool(self([image], space)[0] @ vector < SAME or spaces != {space})


@dataclass
class SearchCounts:
    """Answers to the client that searches."""

    queries: int = 0
    mixed: int = 0
    repeated: int = 0
    """Empty answers: the live space changed between the client's two calls, and it asked again."""


class Table(Protocol):
    """A user's table, the worker of its index, a client that searches and one that writes."""

    index: IndexRow

    def fill(self, rows: int) -> None: ...

    def start_worker(self) -> None: ...

    def kill_worker(self) -> None: ...

    def start_clients(self) -> None: ...

    def finish(self) -> SearchCounts:
        """End the clients, let the worker catch up, and end it."""

    def images(self) -> list[tuple[int, bytes]]:
        """All rows as they are at the end, by ID."""

    def vectors(self) -> dict[int, Vector]:
        """Vectors that clients find, by ID."""

    def nearest(self, vector: Vector) -> set[int]:
        """IDs of the first ten hits of a client."""

    def close(self) -> None: ...
