"""``ratchet ingest``: runs a :class:`~streams.ingest.consumer.Consumer` and says what it does."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Final

from core import metrics
from core.progress import say
from core.settings import Settings
from streams.ingest.consumer import Consumer
from streams.ingest.ingest_report import IngestStatus

SWITCH_SECONDS: Final = 0.0005
"""How long a thread may keep the GIL that another one waits for: reading, committing and publishing take turns."""


def run_ingest(settings: Settings) -> None:
    """Read the topic until SIGTERM or SIGINT, then store what has been read, and return."""
    sys.setswitchinterval(SWITCH_SECONDS)
    processes = settings.ingest.processes or os.cpu_count() or 1
    consumer = Consumer(settings, on_change=ThrottledLog(), processes=processes)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: consumer.stop())
    metrics.build.started("ingest")
    metrics.listen("ingest", settings.ingest.metrics_port, settings.metrics_host)
    say(f"ingest: {settings.kafka.topic} at {settings.kafka.bootstrap} -> {consumer.store.url}")
    consumer.run()


class ThrottledLog:
    """Says what ingest does, at most every five seconds."""

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
        say(
            f"ingest: {status.state}; {status.samples} samples, {status.duplicates} duplicates,"
            f" {status.quarantined} quarantined{lost}, lag {'unknown' if status.lag is None else status.lag}"
        )
