"""What ingest tells: its status, its metrics, and its lines on the screen."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from ops import metrics
from ops.errors import BrokerError, RatchetError, RegistryUnavailable, StoreError, StoreFull
from ops.progress import say
from streams.batch import CommitResult
from streams.ingest_status import Dependency, IngestStatus
from streams.quality.validate import StoreRow
from streams.store import SampleStore
from streams.writer import Claim

#: kafka-python can lose what the group assigned it, and waits for ever then; a busy group takes seconds.
GROUP_PATIENCE_SECONDS: Final = 30.0
STORE_SECONDS: Final = 5.0


class IngestReport:
    """Keeps :attr:`status`, and tells who listens."""

    def __init__(self, store: SampleStore, group: str, on_change: Callable[[IngestStatus], None] | None) -> None:
        self.status = IngestStatus()
        self._store = store
        self._group = group
        self._on_change = on_change
        self._outside_since = time.monotonic()
        self._measured_at = 0.0

    def connected(self, joined: bool, lag: int | None) -> None:
        """The broker answers: so this process reads, or joins the group.

        Raises:
            BrokerError: the group has not let it in for :data:`GROUP_PATIENCE_SECONDS`; to be joined again.
        """
        metrics.ingest.broker(True)
        state = "reading" if joined else "joining"
        if self.status.state != state:
            self._outside_since = time.monotonic()
            metrics.ingest.waiting("")
            self._change(state=state, waiting_for="", problem="")
        outside = time.monotonic() - self._outside_since
        if state == "joining" and outside > GROUP_PATIENCE_SECONDS:
            raise BrokerError(
                f"group {self._group} has not let this process in for {outside:.0f} s; it is joined again.",
                "If that repeats, look at its members (Apache Kafka: kafka-consumer-groups.sh --describe --members);"
                " restart an embedded broker.",
            )
        if lag != self.status.lag:
            self._change(lag=lag)
        self._measure_store()

    def away(self, error: RatchetError, seconds: float) -> Dependency:
        """Something is away, and is tried again in ``seconds``. Returns what it is."""
        dependency = _dependency(error)
        if dependency == "broker":
            metrics.ingest.broker(False)
        metrics.ingest.waiting(dependency)
        self._change(state="waiting", waiting_for=dependency, problem=str(error))
        say(f"ingest: [yellow]{error}[/yellow] Trying again in {seconds:g} s.")
        return dependency

    def committed(self, outcome: CommitResult, lag: int | None, seconds: float) -> None:
        """A batch was stored in this time."""
        refused, gaps = outcome.of_kind("quarantine"), outcome.of_kind("gap")
        metrics.ingest.committed(seconds)
        metrics.ingest.received(outcome.records, outcome.size)
        for split, count in outcome.samples.items():
            metrics.ingest.stored(count, split)
        for kind, count in outcome.duplicates.items():
            metrics.ingest.duplicates(count, kind)
        metrics.ingest.corrected(outcome.corrected)
        for row in refused:
            metrics.ingest.refused(row["reason"])
        now = self.status
        self._change(
            samples=now.samples + outcome.samples.total(),
            duplicates=now.duplicates + outcome.duplicates.total(),
            corrected=now.corrected + outcome.corrected,
            quarantined=now.quarantined + len(refused),
            tombstones=now.tombstones + len(outcome.of_kind("tombstone")),
            commits=now.commits + 1,
            version=outcome.version,
            offsets={**now.offsets, **{reading.claim.key: reading.stored for reading in outcome.readings}},
            lag=lag,
        )
        for row in gaps:
            self.lost(row)

    def lost(self, row: StoreRow) -> None:
        """A gap was stored."""
        count = row["until"] - row["offset"]
        metrics.ingest.lost(count, row["reason"])
        self._change(gap_offsets=self.status.gap_offsets + count)
        say(f"ingest: [red]{row['topic']}:{row['partition']}: {row['detail']} (from {row['offset']})[/red]")

    def rewritten(self, claim: Claim, count: int) -> None:
        """The log was cut off, and is read on under a new claim; ``count`` offsets of it were stored before."""
        metrics.ingest.rewritten(count)
        self._change(rewritten_offsets=self.status.rewritten_offsets + count)
        say(
            f"ingest: [yellow]the log was cut off, as after an unclean leader election: {count} offsets were rewritten"
            f" after they were stored; reading on as {claim.key} from {claim.position.next}[/yellow]"
        )

    def stopped(self) -> None:
        """The consumer has ended."""
        self._change(state="stopped", waiting_for="", problem="")

    def _measure_store(self) -> None:
        if time.monotonic() - self._measured_at > STORE_SECONDS:
            self._measured_at = time.monotonic()
            try:
                tally = self._store.tally()
                rows = {split: tally[split] for split in ("train", "fresh_eval")}
                metrics.ingest.store(rows, self._store.size(), self._store.fragments())
            except StoreError:
                return  # who has to write there will say so

    def _change(self, **changes: Any) -> None:
        self.status = replace(self.status, **changes)
        if self._on_change is not None:
            self._on_change(self.status)


def _dependency(error: RatchetError) -> Dependency:
    if isinstance(error, StoreFull):
        return "disk"
    if isinstance(error, StoreError):
        return "store"
    return "registry" if isinstance(error, RegistryUnavailable) else "broker"
