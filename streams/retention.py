"""How long samples are kept: by age and by bytes, with a reservoir of what has to go.

Replay draws from everything that was ever learned. So of the samples over a limit some stay: a reservoir of
``retention.keep_samples``, balanced over concepts (weighted sampling without replacement, Efraimidis and Spirakis 2006,
weight 1 / samples of the concept), whose keys are functions of the store's secret and the id. What stays once is
drawn again from what is there at each run, so that the reservoir is one of the whole past, whenever retention ran.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import numpy as np

from ops.settings import Retention
from streams.sql import moment, quoted
from streams.store import SampleStore
from streams.writer import StoreWriter

IDS_AT_ONCE: Final = 2000
MOST_AT_ONCE: Final = 100_000
"""Samples that one run removes at most: some seconds of work. The next run goes on."""
_COLUMNS: Final = ["id", "concept", "domain", "split"]


def expire(store: SampleStore, rules: Retention, now: datetime | None = None) -> int:
    """Remove the samples that are over a limit. Returns their number.

    Raises:
        StoreUnavailable: to be tried again.
    """
    limit = _limit(store, rules, now or datetime.now(UTC))
    if limit is None:
        return 0
    expired = _over(store, limit)
    kept = _reservoir(store, limit, rules.keep_samples) if rules.keep_samples else set()
    removed = 0
    for ids in _chunks((name for name, _, _ in expired if name not in kept), IDS_AT_ONCE):
        where = f"kind = 'sample' AND id IN ({', '.join(map(quoted, ids))})"
        removed += len(StoreWriter(store.table).remove(where, "retention", "older than the limit"))
        if removed >= MOST_AT_ONCE:
            break
    return removed


def _limit(store: SampleStore, rules: Retention, now: datetime) -> datetime | None:
    """Samples that were ingested before this are over a limit."""
    limits = []
    if rules.max_age_days:
        limits.append(now - timedelta(days=rules.max_age_days))
    excess = store.tally()["bytes"] - rules.max_bytes if rules.max_bytes else 0
    if excess > 0:
        limits.append(_oldest(store, excess))
    return max(limits, default=None)


def _oldest(store: SampleStore, size: int) -> datetime:
    """The time before which so many bytes were ingested: 16 bytes of memory a sample, for this moment."""
    dataset = store.table.open()
    batches = dataset.to_batches(columns=["ingested_at", "size"], filter="kind = 'sample'") if dataset else ()
    times, sizes = [], []
    for batch in batches:
        times.append(batch["ingested_at"].cast("int64").to_numpy(zero_copy_only=False))
        sizes.append(batch["size"].fill_null(0).to_numpy(zero_copy_only=False))
    moments, weights = np.concatenate(times), np.concatenate(sizes)
    order = np.argsort(moments, kind="stable")
    index = int(np.searchsorted(np.cumsum(weights[order]), size))
    last = moments[order[min(index, len(order) - 1)]]
    return datetime.fromtimestamp(int(last) / 1_000_000, UTC) + timedelta(microseconds=1)


def _over(store: SampleStore, limit: datetime) -> Iterator[tuple[str, str, str]]:
    """Id, concept and split of the samples over the limit."""
    dataset = store.table.open()
    where = f"kind = 'sample' AND ingested_at < {moment(limit)}"
    for batch in dataset.to_batches(columns=_COLUMNS, filter=where) if dataset else ():
        for row in batch.to_pylist():
            yield row["id"], row["concept"] or row["domain"] or "", row["split"]


def _reservoir(store: SampleStore, limit: datetime, capacity: int) -> set[str]:
    """Ids of those that stay. Memory: the capacity, and a number for each concept."""
    _, secret = store.table.identity()
    counts = Counter((concept, split) for _, concept, split in _over(store, limit))
    keyed = (
        (math.log(_uniform(secret, name)) * counts[concept, split], name)
        for name, concept, split in _over(store, limit)
    )
    return {name for _, name in heapq.nlargest(capacity, keyed)}


def _uniform(secret: bytes, name: str) -> float:
    """A number in (0, 1) from a hash."""
    word = hashlib.blake2b(name.encode(), key=secret, digest_size=8).digest()
    return (int.from_bytes(word, "big") + 0.5) / 2**64


def _chunks(names: Iterator[str], size: int) -> Iterator[list[Any]]:
    chunk: list[str] = []
    for name in names:
        chunk.append(name)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
