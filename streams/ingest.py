"""From the topic into the sample store.

One batch after another: read, judge, store samples and offsets in one commit, publish the refusals, and only then tell
Kafka. What Kafka remembers is for others to look at (lag); where to go on is read from the store. Killed at any
instant, every record is in the store or in the quarantine topic exactly once.

A *session* is one membership in the consumer group. A broker that goes away is waited for. When its log is lost, or
another process has taken over, the session ends, what it had read is stored if it still may be, and the next one starts
from what the store says.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ops import metrics
from ops.errors import BrokerError
from ops.progress import say
from ops.settings import Settings
from streams.batch import Outcome, Superseded
from streams.quality.duplicates import StoredLooks
from streams.quarantine import Quarantine
from streams.session import IngestStatus, LogLost, Session
from streams.store import SampleStore

log = logging.getLogger(__name__)
BACKOFF_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0)


class Ingest:
    """Reads the topic until :meth:`stop`.

    >>> ingest = Ingest(settings)
    >>> threading.Thread(target=ingest.run).start()
    >>> ingest.status.samples
    """

    def __init__(
        self,
        settings: Settings,
        store: SampleStore | None = None,
        on_change: Callable[[IngestStatus], None] | None = None,
    ) -> None:
        """``on_change`` is called with the status after every commit and change of state."""
        self.settings = settings
        self.kafka = settings.kafka
        self.store = store or SampleStore(settings.lake)
        self.status = IngestStatus()
        self._on_change = on_change
        self.stopping = threading.Event()
        self.looks = StoredLooks(self.store, settings.ingest.near_duplicate_distance)
        self.quarantine = Quarantine(self.kafka)

    def stop(self) -> None:
        """Ask :meth:`run` to store what it has read, and return. From any thread or a signal handler."""
        self.stopping.set()

    def run(self) -> None:
        """Read until :meth:`stop`; a broker that is away is waited for.

        Raises:
            StoreError: the store cannot be written: nothing is lost, and nothing can go on.
            ConfigError: an option of the Kafka client is wrong.
        """
        failures = 0
        while not self.stopping.is_set():
            before = self.status.commits
            try:
                Session(self).run()
            except Superseded as error:
                log.warning("%s", error)
            except LogLost as error:
                say(f"ingest: [yellow]{error}[/yellow]")
            except BrokerError as error:
                failures = 0 if self.status.commits > before else failures
                self.wait_for_broker(error, failures)
                failures += 1
        self.quarantine.close()
        self.change(state="stopped")

    def wait_for_broker(self, error: BrokerError, failures: int) -> None:
        """Say that the broker is away, and wait: longer after more failures."""
        metrics.ingest.broker(False)
        self.change(state="waiting", problem=str(error))
        wait = BACKOFF_SECONDS[min(failures, len(BACKOFF_SECONDS) - 1)]
        say(f"ingest: [yellow]{error}[/yellow] Trying again in {wait:g} s.")
        self.stopping.wait(wait)

    def change(self, **changes: Any) -> None:
        """Change fields of the status, and tell who listens."""
        self.status = replace(self.status, **changes)
        if self._on_change is not None:
            self._on_change(self.status)

    def stored(self, outcome: Outcome) -> None:
        """Count a commit, in the metrics and in the status."""
        metrics.ingest.received(outcome.records, outcome.size)
        for split, count in outcome.samples.items():
            metrics.ingest.stored(count, split)
        for kind, count in outcome.duplicates.items():
            metrics.ingest.duplicates(count, kind)
        for row in outcome.refused:
            metrics.ingest.refused(row["reason"])
        now = self.status
        self.change(
            samples=now.samples + outcome.samples.total(),
            duplicates=now.duplicates + outcome.duplicates.total(),
            quarantined=now.quarantined + len(outcome.refused),
            commits=now.commits + 1,
            version=outcome.version,
            offsets={**now.offsets, **{cursor.key: cursor.next for cursor in outcome.cursors}},
        )


def run_ingest(settings: Settings) -> None:
    """Read the topic until SIGTERM or SIGINT, then store what has been read, and return."""
    ingest = Ingest(settings, on_change=_Narrator())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: ingest.stop())
    metrics.build.started("ingest")
    metrics.listen("ingest", settings.ingest.metrics_port)
    say(f"ingest: {settings.kafka.topic} at {settings.kafka.bootstrap} -> {ingest.store.url}")
    ingest.run()


class _Narrator:
    """Says what ingest does, at most every five seconds."""

    EVERY_SECONDS = 5.0

    def __init__(self) -> None:
        self._said = IngestStatus()
        self._at = 0.0

    def __call__(self, status: IngestStatus) -> None:
        now = time.monotonic()
        if status.state == self._said.state and now - self._at < self.EVERY_SECONDS:
            return
        self._said, self._at = status, now
        say(
            f"ingest: {status.state}; {status.samples} samples, {status.duplicates} duplicates,"
            f" {status.quarantined} quarantined, lag {'unknown' if status.lag is None else status.lag}"
        )
