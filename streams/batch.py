"""The records between two commits."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ops.errors import RatchetError
from ops.settings import Kafka
from streams.assignment import Cursor, position_after
from streams.quality.duplicates import Looks, StoredLooks
from streams.quality.judge import Accepted, Refused
from streams.rows import Position, Snapshot
from streams.store import SampleStore


class Superseded(RatchetError):
    """Another process has stored records of a partition that this one still held: it must ask the store again."""


@dataclass
class Outcome:
    """What became of the records of a batch."""

    version: int = 0
    """The store's version that holds them."""
    samples: Counter[str] = field(default_factory=Counter)
    """By split."""
    duplicates: Counter[str] = field(default_factory=Counter)
    """By kind."""
    refused: list[dict[str, Any]] = field(default_factory=list)
    """Rows to publish to the quarantine topic."""
    cursors: list[Cursor] = field(default_factory=list)
    records: int = 0
    size: int = 0
    """Bytes of the records."""


class Batch:
    """Judged records that wait for their commit."""

    def __init__(self, kafka: Kafka, looks: StoredLooks) -> None:
        self.kafka = kafka
        self.looks = looks
        self._entries: list[tuple[Cursor, Accepted | Refused, int]] = []
        self._bytes = 0
        self._since = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, cursor: Cursor, judged: Accepted | Refused, size: int) -> None:
        """Take in a record of ``size`` bytes."""
        if not self._entries:
            self._since = time.monotonic()
        self._entries.append((cursor, judged, size))
        self._bytes += size

    def fits(self, size: int) -> bool:
        """Whether a record of ``size`` bytes still has room. The first always has: the broker bounds one record."""
        return not self._entries or self._bytes + size <= self.kafka.batch_bytes

    @property
    def due(self) -> bool:
        """Whether it is time to commit."""
        return bool(self._entries) and (
            len(self._entries) >= self.kafka.batch_records
            or self._bytes >= self.kafka.batch_bytes
            or self.seconds_left <= 0
        )

    @property
    def seconds_left(self) -> float:
        """Until a commit is due; infinite when there is nothing to commit."""
        if not self._entries:
            return float("inf")
        return self._since + self.kafka.batch_seconds - time.monotonic()

    def clear(self) -> None:
        """Forget everything."""
        self._entries = []
        self._bytes = 0

    def commit(self, store: SampleStore, holds: Callable[[Cursor], bool]) -> Outcome:
        """Store, in one commit, what was read under cursors that still hold, and empty the batch.

        Raises:
            Superseded: another process was faster; nothing was stored.
            StoreError: nothing was stored.
        """
        held = [entry for entry in self._entries if holds(entry[0])]
        entries = [(cursor, judged) for cursor, judged, _ in held]
        outcome = Outcome(
            cursors=list(dict.fromkeys(cursor for cursor, _ in entries)),
            records=len(held),
            size=sum(size for _, _, size in held),
        )
        if not entries:
            self.clear()
            return outcome

        moved: list[Position] = []

        def build(snapshot: Snapshot) -> tuple[list[dict[str, Any]], list[Position]]:
            for cursor in outcome.cursors:
                _check_owner(cursor, snapshot)
            outcome.samples, outcome.duplicates, outcome.refused = Counter(), Counter(), []
            self.looks.follow(snapshot)
            rows = self._decide(entries, outcome)
            refused = {(row["topic"], row["partition"]) for row in outcome.refused}
            moved[:] = [
                position_after(cursor, (cursor.stream, cursor.partition) in refused) for cursor in outcome.cursors
            ]
            return rows, moved

        outcome.version = store.commit(build)
        for cursor, position in zip(outcome.cursors, moved, strict=True):
            cursor.stored, cursor.published = position.next, position.published
        self.clear()
        return outcome

    def _decide(self, entries: list[tuple[Cursor, Accepted | Refused]], outcome: Outcome) -> list[dict[str, Any]]:
        """The rows to store: a sample, a repetition (of the store or of this batch), or a refusal."""
        rows = []
        here = Looks(self.looks.distance)
        for _, judged in entries:
            if isinstance(judged, Refused):
                outcome.refused.append(judged.row)
                rows.append(judged.row)
                continue
            row, words = judged.row, judged.words
            about = (row["id"], row["phash"], words)
            twin = self.looks.twin(*about) or here.twin(*about)
            if twin is not None:
                outcome.duplicates[twin.kind] += 1
                rows.append(judged.duplicate(twin.kind, twin.id))
                continue
            here.add(*about)
            outcome.samples[row["split"]] += 1
            rows.append(row)
        return rows


def _check_owner(cursor: Cursor, snapshot: Snapshot) -> None:
    position = snapshot.positions.get(cursor.key)
    found = None if position is None else position.next
    if found != cursor.stored:
        raise Superseded(
            f"{cursor.key} was expected at {cursor.stored} and is at {found} in the store: another process reads it.",
            "It goes on from there.",
        )
