"""The replay buffer: a bounded reservoir over earlier samples, balanced over concepts.

Weighted sampling without replacement (Efraimidis and Spirakis, A-Res): each row gets the key u^(1/w) and the largest
keys stay. u is a hash of seed and id, so that the draw is a pure function of the rows and the seed; w = 1 / decayed
count of the row's concept (MetaCLIP's balancing for a stream: a row counts half after ``half_life`` further rows).
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Candidate(NamedTuple):
    """A row that may be replayed."""

    id: str
    concept: str


def reservoir(
    rows: Sequence[Candidate], capacity: int, half_life: float, seed: int, balanced: bool = True
) -> list[str]:
    """Ids of at most ``capacity`` rows, as :func:`reservoir_order` draws them. ``rows`` are oldest first."""
    keys = np.fromiter((draw_key(row.id, seed) for row in rows), np.uint64, len(rows))
    order = reservoir_order(keys, [row.concept for row in rows], capacity, half_life, balanced)
    return [rows[number].id for number in order]


def reservoir_order(
    keys: np.ndarray, concepts: Sequence[Hashable], capacity: int, half_life: float, balanced: bool = True
) -> np.ndarray:
    """Numbers of at most ``capacity`` rows in the order of the draw: the first m of them are a reservoir of m.

    Args:
        keys: of each row :func:`draw_key`, uint64 [n], oldest row first.
        concepts: of each row.
        balanced: without it all rows are as likely.
    """
    counts = decayed_counts(concepts, half_life) if balanced else {}
    weights = np.fromiter((counts.get(concept, 1.0) for concept in concepts), np.float64, len(keys))
    # log(u^(1/w)) = log(u) / w = log(u) x count; log keeps tiny keys apart.
    logarithms = np.log((keys.astype(np.float64) + 0.5) / 2.0**64) * weights
    order: np.ndarray = np.argsort(-logarithms, kind="stable")[:capacity]
    return order


def decayed_counts(concepts: Iterable[Hashable], half_life: float) -> dict[Hashable, float]:
    """Rows of each concept, the newest counting 1 and one ``half_life`` rows older counting 0.5."""
    growth = math.log(2) / half_life
    sums: dict[Hashable, float] = defaultdict(float)
    last: dict[Hashable, int] = {}
    number = -1
    for number, concept in enumerate(concepts):
        passed = number - last.get(concept, number)
        sums[concept] = sums[concept] * math.exp(-growth * passed) + 1.0
        last[concept] = number
    return {concept: count * math.exp(-growth * (number - last[concept])) for concept, count in sums.items()}


def draw_key(name: str, seed: int) -> int:
    """64 bits of a hash of seed and id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")
