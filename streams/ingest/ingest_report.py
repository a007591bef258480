"""Status, metrics and console output of ingest."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from core import metrics
from core.dependencies import Dependency, answered, noted
from core.errors import BrokerError, RatchetError, StoreError, StoreUnavailable
from core.progress import progress_log
from streams.ingest.batch import CommitResult
from streams.store.rows import SPLITS
from streams.store.sample_store import SampleStore
from streams.store.writer import Claim

State = Literal["starting", "joining", "reading", "waiting", "stopped"]


@dataclass(frozen=True, slots=True)
class IngestStatus:
    state: State = "starting"
    """``joining`` the consumer group; ``waiting`` for :attr:`waiting_for`."""
    waiting_for: Dependency | Literal[""] = ""
    samples: int = 0
    duplicates: int = 0
    corrected: int = 0
    quarantined: int = 0
    tombstones: int = 0
    gap_offsets: int = 0
    rewritten_offsets: int = 0
    """Offsets truncated from the log after their records were stored; other records are there now."""
    commits: int = 0
    version: int = 0
    lag: int | None = None
    """Records between the store and the end of the log; None until known."""
    offsets: dict[str, int] = field(default_factory=dict)
    problem: str = ""


#: kafka-python can lose its assignment, and then waits for ever; a busy group takes seconds.
GROUP_PATIENCE_SECONDS: Final = 30.0
STORE_SECONDS: Final = 4.0
"""Interval of store checks, and the time after which an unanswered one marks the store as slow."""


class IngestReport:
    """Maintains :attr:`status`, and notifies the listener. A separate thread watches the store: Lance retries for
    minutes when a store does not answer, and the consumer's thread waits for that."""

    def __init__(self, store: SampleStore, group: str, on_change: Callable[[IngestStatus], None] | None) -> None:
        self.status = IngestStatus()
        self._store = store
        self._group = group
        self._on_change = on_change
        self._outside_since = time.monotonic()
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._store_problem = ""

    def watch_store(self) -> None:
        threading.Thread(target=self._watch_store, name="store-watch", daemon=True).start()

    def connected(self, joined: bool, lag: int | None) -> None:
        """Report that the broker answers. Raises BrokerError, to join again, if the group has not admitted this process
        for :data:`GROUP_PATIENCE_SECONDS`."""
        state = "reading" if joined else "joining"
        with self._lock:
            if self.status.state != state and not self._store_problem:
                self._outside_since = time.monotonic()
                waited_for = self.status.waiting_for
                answered(["broker", waited_for] if waited_for else ["broker"])
                metrics.ingest.waiting("")
                self._change(state=state, waiting_for="", problem="")
        outside = time.monotonic() - self._outside_since
        if state == self.status.state == "joining" and outside > GROUP_PATIENCE_SECONDS:
            raise BrokerError(
                f"group {self._group} has not let this process in for {outside:.0f} s; it is joined again.",
                "If that repeats, look at its members (Apache Kafka: kafka-consumer-groups.sh --describe --members);"
                " restart an embedded broker.",
            )
        if lag != self.status.lag:
            self._change(lag=lag)

    def away(self, error: RatchetError, seconds: float) -> Dependency:
        """Report an outage that is retried in ``seconds``. Returns the dependency."""
        dependency = self._wait_for(error)
        progress_log.warning(f"ingest: {error} Trying again in {seconds:g} s.")
        return dependency

    def committed(self, outcome: CommitResult, lag: int | None, seconds: float) -> None:
        quarantined, gaps = outcome.of_kind("quarantine"), outcome.of_kind("gap")
        metrics.ingest.committed(seconds)
        metrics.ingest.received(outcome.records, outcome.size)
        for split, count in outcome.samples.items():
            metrics.ingest.stored(count, split)
        for kind, count in outcome.duplicates.items():
            metrics.ingest.duplicates(count, kind)
        metrics.ingest.corrected(outcome.corrected)
        for row in quarantined:
            metrics.ingest.refused(row["reason"])
        now = self.status
        self._change(
            samples=now.samples + outcome.samples.total(),
            duplicates=now.duplicates + outcome.duplicates.total(),
            corrected=now.corrected + outcome.corrected,
            quarantined=now.quarantined + len(quarantined),
            tombstones=now.tombstones + len(outcome.of_kind("tombstone")),
            commits=now.commits + 1,
            version=outcome.version,
            offsets={**now.offsets, **{reading.claim.key: reading.stored for reading in outcome.readings}},
            lag=lag,
        )
        for row in gaps:
            count = row["until"] - row["offset"]
            metrics.ingest.lost(count, row["reason"])
            self._change(gap_offsets=self.status.gap_offsets + count)
            progress_log.error(f"ingest: {row['topic']}:{row['partition']}: {row['detail']} (from {row['offset']})")

    def rewritten(self, claim: Claim, count: int) -> None:
        """Report a truncated log, read on under a new claim; ``count`` of its offsets were stored before."""
        metrics.ingest.rewritten(count)
        self._change(rewritten_offsets=self.status.rewritten_offsets + count)
        progress_log.warning(
            f"ingest: the log was cut off, as after an unclean leader election: {count} offsets were rewritten"
            f" after they were stored; reading on as {claim.key} from {claim.position.next}"
        )

    def stopped(self) -> None:
        self._ending.set()
        self._change(state="stopped", waiting_for="", problem="")

    def _watch_store(self) -> None:
        problem = f"the sample store {self._store.url} does not answer within {STORE_SECONDS:g} s."
        slow = StoreUnavailable(problem, "Records wait in the topic until it does.", "slow")
        measured = -1
        while not self._ending.wait(STORE_SECONDS):
            silent = threading.Timer(STORE_SECONDS, self._store_fails, [slow])
            silent.daemon = True
            silent.start()
            try:
                if (version := self._store.version()) != measured:
                    tally, measured = self._store.tally(), version
                    rows: dict[str, int] = {split: tally[split] for split in SPLITS}
                    metrics.ingest.store(rows, self._store.size(), self._store.fragments())
            except StoreError as error:
                silent.cancel()
                self._store_fails(error)
            else:
                silent.cancel()
                self._store_answers()

    def _store_fails(self, error: StoreError) -> None:
        with self._lock:
            if not self._ending.is_set() and str(error) != self._store_problem:
                self._store_problem = str(error)
                self._wait_for(error)
                progress_log.warning(f"ingest: {error}")

    def _store_answers(self) -> None:
        with self._lock:
            if self._store_problem:
                self._store_problem = ""
                progress_log.info("ingest: the store answers again")
            elif self.status.waiting_for == "store":
                return  # readable, but perhaps not writable
            answered(["store"])

    def _wait_for(self, error: RatchetError) -> Dependency:
        with self._lock:
            dependency = noted(error) or "broker"
            metrics.ingest.waiting(dependency)
            self._change(state="waiting", waiting_for=dependency, problem=str(error))
            return dependency

    def _change(self, **changes: Any) -> None:
        with self._lock:
            self.status = replace(self.status, **changes)
            if self._on_change is not None:
                self._on_change(self.status)


class ThrottledLog:
    EVERY_SECONDS: Final = 5.0

    def __init__(self) -> None:
        self._last = IngestStatus()
        self._logged_at = 0.0

    def __call__(self, status: IngestStatus) -> None:
        now = time.monotonic()
        if status.state == self._last.state and now - self._logged_at < self.EVERY_SECONDS:
            return
        self._last, self._logged_at = status, now
        lost = f", {status.gap_offsets} offsets lost" if status.gap_offsets else ""
        progress_log.info(
            f"ingest: {status.state}; {status.samples} samples, {status.duplicates} duplicates,"
            f" {status.quarantined} quarantined{lost}, lag {'unknown' if status.lag is None else status.lag}"
        )
