"""Whom a sample comes from, and whether it is held for that.

A topic of its own, which the broker's ACLs leave to one producer, proves a source (:attr:`Kafka.bound`). Elsewhere a
source is what the record's headers claim. What Ratchet itself sends, corrections and audited answers, is signed with a
secret of the sample store. A claim to a source that is bound or signed, without either, becomes ``claimed:SOURCE``."""

from __future__ import annotations

import hmac
import time
from collections import Counter
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Any, Final

from core.settings.streams import Kafka
from core.settings.trust import SourceRule, Trust
from streams.records.signatures import is_signed, sign
from streams.store.conditions import is_in, moment, quoted
from streams.store.rows import HELD, SampleTable, Split, parse_stream
from streams.store.sample_store import SampleStore

CLAIMED: Final = "claimed:"


def source_of(kafka: Kafka, key: bytes, stream: str, claimed: str, sample_id: str, signature: bytes) -> str:
    bound = kafka.bound
    if (source := bound.get(parse_stream(stream)[0])) is not None:
        return source
    signed = is_signed(claimed)
    if signed and hmac.compare_digest(sign(key, sample_id, claimed), signature):
        return claimed
    return f"{CLAIMED}{claimed}"[:256] if signed or claimed in bound.values() else claimed


COUNT_SECONDS: Final = 10.0
"""Interval of counting in the store: so much of what other workers stored is unknown."""

MOST: Final = 1000
"""Sources that are counted together."""


class Holds:
    """Holds new samples by the rules on their sources. Several workers together exceed a daily number by what they
    store within :data:`COUNT_SECONDS`."""

    def __init__(self, trust: Trust, table: SampleTable) -> None:
        self._trust = trust
        self._store = SampleStore(table.url.rsplit("/", 1)[0])
        self._today: Counter[str] = Counter()
        self._batch: Counter[str] = Counter()
        self._counted_at = -COUNT_SECONDS

    def begin(self, sources: Iterable[str | None]) -> None:
        """A commit is prepared, perhaps again; ``sources``: of its samples. Raises StoreUnavailable."""
        self._batch.clear()
        rules = ((source or "", self._trust.rule(source or "")) for source in set(sources))
        bounded = {source for source, found in rules if found is not None and found[1].per_day}
        if bounded - self._today.keys() or (bounded and time.monotonic() - self._counted_at >= COUNT_SECONDS):
            self._count(bounded | (self._today.keys() if len(self._today) < MOST else set()))

    def stored(self) -> None:
        """The commit was made."""
        self._today.update(self._batch)
        self._batch.clear()

    def place(self, row: dict[str, Any], side: Split) -> dict[str, Any]:
        """Columns of a new sample that the split has put on a side. Raises StoreUnavailable."""
        source = row["source"] or ""
        found = self._trust.rule(source)
        why = None if found is None else self._why(source, *found)
        return {"split": side} if why is None else {"split": f"{HELD}{side}", "reason": why[0], "detail": why[1]}

    def _why(self, source: str, pattern: str, rule: SourceRule) -> tuple[str, str] | None:
        if rule.hold:
            return "held_source", f"trust.sources holds all samples of {pattern}"
        if rule.per_day:
            if self._today[source] + self._batch[source] >= rule.per_day:
                return "held_quota", f"trust.sources allows {pattern} {rule.per_day} samples a day"
            self._batch[source] += 1
        return None

    def _count(self, sources: Collection[str]) -> None:
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        named = is_in("source", map(quoted, sorted(sources)))
        used = f"kind = 'sample' AND split IN ('train', 'fresh_eval') AND ingested_at >= {moment(midnight)} AND {named}"
        counts: Counter[str] = Counter(dict.fromkeys(sources, 0))
        for batch in self._store.batches(used, ["source"]):
            counts.update(batch["source"].to_pylist())
        self._today = counts
        self._counted_at = time.monotonic()
