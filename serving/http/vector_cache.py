"""Vectors that were computed before, by content and embedding space, bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from serving.messages import Modality

CacheKey = tuple[Modality, str, bytes]
"""Image or text; the embedding space of that tower; SHA-256 of the content. An entry is of its space for ever, so no
release can be answered with the vectors of another one."""
ENTRY_BYTES: Final = 640
"""What an entry takes beside its numbers: the array (112), the digest (65), key and entry (150), its place in two dicts
and a linked list (300)."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedVector:
    """One item's vector, float32 [dim] of unit length."""

    vector: npt.NDArray[np.float32]
    logit_scale: float
    tokens: int
    """Of a text; 0 for an image."""
    cut: bool = False
    """Whether the text was longer than the model reads."""


class VectorCache:
    """Forgets what was not asked for the longest. Used from one event loop only, so it needs no lock.

    Args:
        max_bytes: of all entries; 0: nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[CacheKey, CachedVector] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: CacheKey) -> CachedVector | None:
        """What is kept for a key."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: CacheKey, entry: CachedVector) -> None:
        """Keep an entry, and forget the oldest ones over the bound."""
        if key in self._entries or entry.vector.nbytes + ENTRY_BYTES > self.max_bytes:
            return
        self._entries[key] = entry
        self.bytes += entry.vector.nbytes + ENTRY_BYTES
        while self.bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.vector.nbytes + ENTRY_BYTES
