"""Whom a sample comes from, and whether it is held for that.

A topic of its own, which the broker's ACLs leave to one producer, proves a source (:attr:`Kafka.bound`). Elsewhere a
source is what the record's headers claim. What Ratchet itself sends, corrections and audited answers, is signed with a
secret of the sample store. A claim to a source that is bound or signed, without either, becomes ``claimed:SOURCE``."""

from __future__ import annotations

import hmac
from collections import Counter
from datetime import UTC, datetime
from typing import Any, Final

from core.settings.streams import Kafka
from core.settings.trust import SourceRule, Trust
from streams.records.signatures import is_signed, sign
from streams.store.conditions import moment, quoted
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


class Holds:
    """Holds new samples by the rules on their sources. A daily number is counted anew for each commit: several workers
    together exceed it by a commit each at most."""

    def __init__(self, trust: Trust, table: SampleTable) -> None:
        self._trust = trust
        self._store = SampleStore(table.url.rsplit("/", 1)[0])
        self._today: Counter[str] = Counter()

    def begin(self) -> None:
        """Forget the counts: another commit begins."""
        self._today.clear()

    def place(self, row: dict[str, Any], side: Split) -> dict[str, Any]:
        """Columns of a new sample that the split has put on a side. Raises StoreUnavailable."""
        found = self._trust.rule(row["source"] or "")
        why = None if found is None else self._why(row["source"] or "", *found)
        return {"split": side} if why is None else {"split": f"{HELD}{side}", "reason": why[0], "detail": why[1]}

    def _why(self, source: str, pattern: str, rule: SourceRule) -> tuple[str, str] | None:
        if rule.hold:
            return "held_source", f"trust.sources holds all samples of {pattern}"
        if rule.per_day:
            if source not in self._today:
                self._today[source] = self._stored_today(source)
            if self._today[source] >= rule.per_day:
                return "held_quota", f"trust.sources allows {pattern} {rule.per_day} samples a day"
            self._today[source] += 1
        return None

    def _stored_today(self, source: str) -> int:
        midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        used = f"kind = 'sample' AND split IN ('train', 'fresh_eval') AND ingested_at >= {moment(midnight)}"
        return self._store.count_rows(f"{used} AND source = {quoted(source)}")
