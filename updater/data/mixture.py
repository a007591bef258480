"""The rows of a batch: a pure function of seed and step, so that a resumed run sees the same batches."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from updater.recipes import PARTS, Mixture, Part


@dataclass(frozen=True)
class BatchPlan:
    """Rows of each pool in one batch, and the order in which pools are traversed. A pool is traversed in epochs: first
    in draw order, then shuffled again for each later epoch. So new rows are visited in order, and a longer pool has the
    same first batches."""

    counts: Mapping[Part, int]
    sizes: Mapping[Part, int]
    seed: int
    runs: Mapping[Part, tuple[int, ...]] = field(default_factory=dict)
    """First rows of runs that stay together in later epochs, for pools that have them."""

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    def batch(self, step: int) -> list[tuple[Part, int]]:
        return [
            (part, self._row(part, step * count + number))
            for part, count in self.counts.items()
            for number in range(count)
        ]

    def visited(self, part: Part, steps: int) -> int:
        return min(self.sizes[part], steps * self.counts.get(part, 0))

    def _row(self, part: Part, position: int) -> int:
        epoch, place = divmod(position, self.sizes[part])
        if epoch == 0:
            return place
        key = f"{self.seed} {part} {epoch}"
        if part in self.runs:
            return _shuffled_runs(self.sizes[part], self.runs[part], key)[place]
        return shuffled(self.sizes[part], key)[place]


def plan_batches(mixture: Mixture, batch_size: int, sizes: Mapping[Part, int], seed: int) -> BatchPlan:
    """Divide a batch by the mixture's shares. The share of an empty P goes to B and vice versa, otherwise to D. Raises
    ValueError if there is nothing new."""
    if sizes["new"] == 0:
        raise ValueError("there are no new rows to learn from")
    shares: dict[Part, float] = {"new": mixture.new, "reference": mixture.reference, "replay": mixture.replay}
    for empty, heir in (("replay", "reference"), ("reference", "replay")):
        if sizes[empty] == 0:  # type: ignore[index]
            target: Part = heir if sizes[heir] else "new"  # type: ignore[index,assignment]
            shares[target] += shares[empty]  # type: ignore[index]
            shares[empty] = 0.0  # type: ignore[index]
    counts = _apportioned(batch_size, shares)
    return BatchPlan({part: counts[part] for part in PARTS if counts[part]}, dict(sizes), seed)


def _apportioned(rows: int, shares: Mapping[Part, float]) -> dict[Part, int]:
    """Whole rows within one of each share, by largest remainders; every batch has at least one new row."""
    exact = {part: rows * share for part, share in shares.items()}
    counts = {part: math.floor(value) for part, value in exact.items()}
    by_remainder = sorted(exact, key=lambda part: counts[part] - exact[part])
    for part in by_remainder[: rows - sum(counts.values())]:
        counts[part] += 1
    if counts["new"] == 0:
        counts["new"] = 1
        counts[max(counts, key=lambda part: counts[part] - exact[part] if part != "new" else -math.inf)] -= 1
    return counts


@lru_cache(maxsize=8)
def shuffled(size: int, key: str) -> tuple[int, ...]:
    """Permutation of ``range(size)``, determined by the key."""
    order = list(range(size))
    # Python's generator, seeded by a hash: the same on every machine and for every version of torch.
    random.Random(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")).shuffle(order)  # noqa: S311
    return tuple(order)


@lru_cache(maxsize=8)
def _shuffled_runs(size: int, starts: tuple[int, ...], key: str) -> tuple[int, ...]:
    ends = (*starts[1:], size)
    return tuple(row for run in shuffled(len(starts), key) for row in range(starts[run], ends[run]))
