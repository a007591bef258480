"""Tests whether the new samples of a stream differ from those before them, for the trigger ``drift``.

The first n new samples are compared with the n newest ones before them, at n = 64, 128, 256 and so on. For each of
domain, concept and label the statistic is the total variation distance: half the sum of the absolute differences of
the values' shares. Its p-value is that of a permutation test, which is exact if the samples are exchangeable. Look
number k = 1, 2, ... spends :data:`ALPHA` / (k (k + 1)), a third of it on each column: at most :data:`ALPHA` for all
looks together. So without drift it triggers for at most 5% of the updates, however often it is asked. A stream that
sends one kind of samples after the other is not exchangeable, and drifts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from streams.store.sample_store import Having, SampleStore

ALPHA: Final = 0.05
LEAST: Final = 0.1
"""Excess of the distance over its mean without drift: smaller changes are not worth an update."""
FIRST_LOOK: Final = 64
PERMUTATIONS: Final = 20_000
"""Resolves the levels of the first 16 looks, two million samples."""
VALUES: Final = 100
"""Most frequent values of a column, of :data:`LEAST_COUNT` samples at least; all others count as one."""
LEAST_COUNT: Final = 5
OFFSETS: Final = 4
"""Offsets of each partition to search for earlier samples, for each wanted one: others are held out, or refused."""
COLUMNS: Final = ("domain", "concept", "label")


@dataclass(frozen=True)
class Drift:
    found: bool
    text: str


def look_at(count: int) -> int:
    """Number of samples of the newest look that ``count`` new samples are enough for; 0 if they are too few."""
    return 1 << (count.bit_length() - 1) if count >= FIRST_LOOK else 0


@lru_cache(maxsize=8)  # asked every few seconds; neither the first new samples nor those before them change
def drift_of(store: SampleStore, having: Having, after: tuple[tuple[str, int], ...], size: int) -> Drift:
    """Compare the first ``size`` new samples, a power of two from 64, with the ``size`` newest ones before them.
    ``after``: the next offsets of the earlier ones, by partition. Raises StoreError."""
    before, new = _samples(store, having, dict(after), size)
    if min(len(before), len(new)) < FIRST_LOOK:  # samples may have been deleted since they were counted
        return Drift(False, f"no drift can be shown: there are {len(before)} earlier samples to compare with")
    look = (size // FIRST_LOOK).bit_length()
    level = ALPHA / (look * (look + 1)) / len(COLUMNS)
    tests = {name: distance_test(before[name].to_pylist(), new[name].to_pylist()) for name in COLUMNS}
    shifted = {name: test for name, test in tests.items() if test[1] >= LEAST and test[2] <= level}
    name, (distance, _, chance) = max((shifted or tests).items(), key=lambda each: each[1][1])
    text = f"{name} of {len(new)} new samples is {distance:.2f} from that of {len(before)} earlier ones"
    return Drift(bool(shifted), f"{text} (p {chance:.2g})")


def distance_test(before: Sequence[str], after: Sequence[str]) -> tuple[float, float, float]:
    """Total variation distance of two samples' values, its excess over the mean under permutation, and its p-value."""
    counts, after_counts = Counter([*before, *after]), Counter(after)
    frequent = (value for value, count in counts.items() if count >= LEAST_COUNT)
    values = sorted(frequent, key=lambda value: (-counts[value], value))[:VALUES]  # whichever sample they are of
    total = np.array([*(counts[value] for value in values), 0])
    ours = np.array([*(after_counts[value] for value in values), 0])
    total[-1], ours[-1] = len(before) + len(after) - total.sum(), len(after) - ours.sum()
    draws = np.random.default_rng(0).multivariate_hypergeometric(total, len(after), PERMUTATIONS, method="marginals")
    drawn = np.vstack([ours, draws])
    distances = (np.abs(drawn / len(after) - (total - drawn) / len(before)).sum(axis=1) / 2).round(9)
    chance = np.mean(distances >= distances[0])
    return float(distances[0]), float(distances[0] - distances[1:].mean()), float(chance)


def _samples(store: SampleStore, having: Having, after: Mapping[str, int], size: int) -> tuple[pa.Table, pa.Table]:
    """Training samples with :data:`COLUMNS`: at most ``size`` before the offsets, the newest, and as many after them,
    the first."""
    reach = {place: max(0, offset - OFFSETS * size) for place, offset in after.items()}
    columns = ["ingested_at", "topic", "partition", "offset", *COLUMNS]
    rows = store.scan(split="train", after=reach, columns=columns, having=having)
    places = zip(*(rows[name].to_pylist() for name in columns[1:4]), strict=True)
    is_new = pa.array((offset >= after.get(f"{topic}:{number}", 0) for topic, number, offset in places), pa.bool_())
    order = [("ingested_at", "ascending"), ("offset", "ascending")]
    before, new = (rows.filter(mask).sort_by(order) for mask in (pc.invert(is_new), is_new))
    return before[max(0, len(before) - size) :], new[:size]
