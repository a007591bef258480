"""The replay buffer: a bounded reservoir over earlier samples, balanced over concepts.

Weighted sampling without replacement (Efraimidis and Spirakis, A-Res): each row gets the key u^(1/w) and the largest
keys stay. u is a hash of seed and id, so that the draw is a pure function of the rows and the seed; w = 1 / decayed
count of the row's concept (MetaCLIP's balancing for a stream: a row counts half after ``half_life`` further rows).
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Candidate(NamedTuple):
    """A row that may be replayed."""

    id: str
    concept: str


def reservoir(
    rows: Sequence[Candidate], capacity: int, half_life: float, seed: int, balanced: bool = True
) -> list[str]:
    """Ids of at most ``capacity`` rows, in row order. ``rows`` are oldest first; unbalanced, all are as likely."""
    if len(rows) <= capacity:
        return [row.id for row in rows]
    counts = decayed_counts((row.concept for row in rows), half_life) if balanced else {}
    # log(u^(1/w)) = log(u) / w = log(u) x count; log keeps tiny keys apart.
    keys = [
        (math.log(_uniform(row.id, seed)) * counts.get(row.concept, 1.0), number) for number, row in enumerate(rows)
    ]
    kept = sorted(number for _, number in heapq.nlargest(capacity, keys))
    return [rows[number].id for number in kept]


def decayed_counts(concepts: Iterable[str], half_life: float) -> dict[str, float]:
    """Rows of each concept, the newest counting 1 and one ``half_life`` rows older counting 0.5."""
    growth = math.log(2) / half_life
    sums: dict[str, float] = defaultdict(float)
    last: dict[str, int] = {}
    number = -1
    for number, concept in enumerate(concepts):
        passed = number - last.get(concept, number)
        sums[concept] = sums[concept] * math.exp(-growth * passed) + 1.0
        last[concept] = number
    return {concept: count * math.exp(-growth * (number - last[concept])) for concept, count in sums.items()}


def _uniform(name: str, seed: int) -> float:
    """A number in (0, 1) from a hash."""
    word = hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]
    return (int.from_bytes(word, "big") + 0.5) / 2**64
