"""What :mod:`benchmarks.index.run_index` needs of a user's table: :class:`Table`."""

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


class Encoder:
    """The base and an adapter, by image space: what ``/v1/embeddings`` answers to a pinned ``space``."""

    def __init__(self, settings: Settings, adapter: str) -> None:
        """``adapter``: made by :func:`benchmarks.swap.make_adapters`, the first."""
        self.adapter = adapter
        self.engine = ClipEngine.of(settings, load_base(settings.home, settings.base.clip))
        self.engine.load(adapter, settings.home / "random" / "0")
        self.clips: dict[str, str | None] = {self.engine.spaces(clip).image: clip for clip in (None, adapter)}

    def __call__(self, images: Sequence[bytes], space: str, page: int = 64) -> Vector:
        """Vectors [n, dim]."""
        pixels = np.stack([self.engine.base.preprocess.pixels(image) for image in images])
        parts = [pixels[at : at + page] for at in range(0, len(pixels), page)]
        return np.concatenate([self.engine.encode_images(part, self.clips[space]) for part in parts])


@dataclass
class Seen:
    """What the client that searches has seen."""

    queries: int = 0
    mixed: int = 0
    repeated: int = 0
    """Empty answers: the live space changed between the client's two calls, and it asked again."""

    def note(self, image: bytes, vector: Vector, spaces: set[str], space: str, encode: Encoder) -> None:
        """Judge one answer by its nearest row: its image, its vector, and the spaces of all rows."""
        self.queries += 1
        self.mixed += bool(encode([image], space)[0] @ vector < SAME or spaces != {space})


class Table(Protocol):
    """A user's table, the worker of its index, a client that searches and one that writes."""

    index: IndexRow

    def fill(self, rows: int) -> None: ...

    def start_worker(self) -> None: ...

    def end_worker(self, kill: bool = False) -> None: ...

    def start_clients(self) -> None: ...

    def finish(self) -> Seen:
        """End the clients, let the worker catch up, and end it."""

    def images(self) -> list[tuple[int, bytes]]:
        """All rows as they are at the end, by ID."""

    def vectors(self) -> dict[int, Vector]:
        """What clients find, by ID."""

    def nearest(self, vector: Vector) -> set[int]:
        """IDs of the first ten hits of a client."""

    def close(self) -> None: ...
