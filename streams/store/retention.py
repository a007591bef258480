"""Limits by age and bytes for samples and quarantined records, with a reservoir of samples that stay.

Replay draws from everything that was ever learned, so some samples over a limit stay: a reservoir of
``retention.keep_samples``, divided equally among concepts as far as each has that many. Within a concept those with the
lowest keyed hash of their IDs stay (bottom-k sampling; Cohen and Kaplan, "Summarizing data using bottom-k sketches",
2007). The hash order never changes, so the reservoir is a sample of the whole past, whenever retention ran.

Quarantined records have no reservoir. Those not known to be in the quarantine topic stay until they are.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np

from core.settings.streams import Retention
from streams.store.conditions import CONTENT, at_positions, is_in, moment, quoted
from streams.store.rows import RecordPosition, chunks, position_of
from streams.store.sample_store import SampleStore
from streams.store.writer import StoreWriter

IDS_AT_ONCE: Final = 2000
MOST_AT_ONCE: Final = 100_000
"""Most samples, and most quarantined records, that one run removes: some seconds of work. The next run continues."""
_COLUMNS: Final = ["id", "concept", "domain"]


def expire(store: SampleStore, rules: Retention, now: datetime | None = None) -> int:
    """Remove samples and quarantined records over a limit. Returns their number. Raises StoreUnavailable."""
    limit = _limit(store, rules, now or datetime.now(UTC))
    if limit is None:
        return 0
    _, secret = store.table.identity()
    retained = _reservoir(store, secret, limit, rules.keep_samples) if rules.keep_samples else set()
    expired = (name for name, _ in _over(store, limit) if _hash(secret, name) not in retained)
    removed = 0
    for ids in chunks(expired, IDS_AT_ONCE):
        where = f"kind = 'sample' AND {is_in('id', map(quoted, ids))}"
        removed += len(StoreWriter(store.table).remove(where, "retention", "older than the limit"))
        if removed >= MOST_AT_ONCE:
            break
    return removed + _expire_quarantine(store, limit)


def _expire_quarantine(store: SampleStore, limit: datetime) -> int:
    published = [
        f"(topic = {quoted(each.stream)} AND partition = {each.partition} AND offset < {each.published})"
        for each in store.positions().values()
    ]
    over = f"kind = 'quarantine' AND ingested_at < {moment(limit)} AND ({' OR '.join(published) or 'false'})"
    found: list[RecordPosition] = []
    for batch in store.batches(over, ["topic", "partition", "offset"]):
        found += map(position_of, batch.to_pylist())
        if len(found) >= MOST_AT_ONCE:
            break
    removed = 0
    for some in chunks(found, IDS_AT_ONCE):
        where = f"kind = 'quarantine' AND ({at_positions(some)})"
        removed += len(StoreWriter(store.table).remove(where, "retention", "older than the limit"))
    return removed


def _limit(store: SampleStore, rules: Retention, now: datetime) -> datetime | None:
    limits = []
    if rules.max_age_days:
        limits.append(now - timedelta(days=rules.max_age_days))
    tally = store.tally()
    excess = tally["bytes"] + tally["refused_bytes"] - rules.max_bytes if rules.max_bytes else 0
    if excess > 0:
        limits.append(_oldest(store, excess))
    return max(limits, default=None)


def _oldest(store: SampleStore, size: int) -> datetime:
    """The time by which the oldest ``size`` bytes were ingested. Uses 16 bytes of memory per row."""
    times, sizes = [], []
    for batch in store.batches(CONTENT, ["ingested_at", "size"]):
        times.append(batch["ingested_at"].cast("int64").to_numpy(zero_copy_only=False))
        sizes.append(batch["size"].fill_null(0).to_numpy(zero_copy_only=False))
    moments, weights = np.concatenate(times), np.concatenate(sizes)
    order = np.argsort(moments, kind="stable")
    index = int(np.searchsorted(np.cumsum(weights[order]), size))
    last = moments[order[min(index, len(order) - 1)]]
    return datetime.fromtimestamp(int(last) / 1_000_000, UTC) + timedelta(microseconds=1)


def _over(store: SampleStore, limit: datetime) -> Iterator[tuple[str, str]]:
    for batch in store.batches(f"kind = 'sample' AND ingested_at < {moment(limit)}", _COLUMNS):
        for row in batch.to_pylist():
            yield row["id"], row["concept"] or row["domain"] or ""


def _reservoir(store: SampleStore, secret: bytes, limit: datetime, capacity: int) -> set[int]:
    """Hashes of the IDs that stay. Uses 12 bytes of memory per sample over the limit."""
    numbers: dict[str, int] = {}
    hashes, concepts = array("Q"), array("I")
    for name, concept in _over(store, limit):
        hashes.append(_hash(secret, name))
        concepts.append(numbers.setdefault(concept, len(numbers)))
    order = np.lexsort((hashes, concepts))
    keys, groups = np.asarray(hashes, np.uint64)[order], np.asarray(concepts, np.uint32)[order]
    sizes = np.bincount(groups)
    ranks = np.arange(len(keys)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    level = _level(sizes.tolist(), capacity)
    retained = keys[ranks < level]
    rest = np.sort(keys[ranks == level])[: max(0, capacity - len(retained))]
    return {*retained.tolist(), *rest.tolist()}


def _level(sizes: Iterable[int], capacity: int) -> int:
    """The largest equal share per concept with which all fit into the capacity."""
    ordered, left = sorted(sizes), capacity
    for index, size in enumerate(ordered):
        share = left // (len(ordered) - index)
        if size > share:
            return share
        left -= size
    return capacity


def _hash(secret: bytes, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), key=secret, digest_size=8).digest(), "big")
