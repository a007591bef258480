"""The operator of a chaos run: releases adapters, rolls them back, and measures how long that takes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Final

from benchmarks.serving.chaos_audit import Refusal, Rollback, StateReport
from benchmarks.serving.whole_server import WholeServer
from core.progress import progress_log
from ratchet_client import ServerError

RELEASE_SECONDS: Final = 60.0
ROLLBACK_SECONDS: Final = 60.0
"""A rollback that has not succeeded after this time failed."""
CALL_SECONDS: Final = 30.0
REFUSAL_SECONDS: Final = 15.0
RETRY_SECONDS: Final = 0.05


def now() -> float:
    """The available-since time of a store that was never down."""
    return 0.0


class Operator:
    """Calls a server as people do. ``clips`` and ``vlms``: adapters to release in turn."""

    def __init__(self, clips: list[str], vlms: list[str]) -> None:
        self._clips = itertools.cycle(clips)
        self._vlms = itertools.cycle(vlms) if vlms else None
        self._count = 0

    def release(self, server: WholeServer, report: StateReport, clip: str | None = None) -> bool:
        """Release this adapter or the next one (every third time one of the VLM). Returns whether it went live."""
        self._count += 1
        try:
            with server.client(RELEASE_SECONDS) as client:
                if clip is None and self._vlms is not None and self._count % 3 == 0:
                    client.release(vlm=next(self._vlms), reason="chaos", force=True, timeout=RELEASE_SECONDS)
                else:
                    name = clip or next(self._clips)
                    client.release(name, reason="chaos", force=True, timeout=RELEASE_SECONDS)
        except ServerError as error:
            report.releases_failed += 1
            progress_log.info(f"release in {report.state}: {error}")
            return False
        report.releases += 1
        return True

    def rollback(self, server: WholeServer, report: StateReport, available: Callable[[], float] = now) -> None:
        """Roll back, and retry until it succeeds. ``available``: since when the ledger answers, by
        :func:`time.monotonic`.
        """
        requested_at, errors, done = time.monotonic(), [], False
        while not done and time.monotonic() < max(requested_at, available()) + ROLLBACK_SECONDS:
            try:
                with server.client(CALL_SECONDS) as client:
                    client.rollback(f"chaos: {report.state}", timeout=CALL_SECONDS)
                done = True
            except ServerError as error:
                errors.append(f"{error.status}: {str(error)[:300]}")
                time.sleep(RETRY_SECONDS)
        seconds = max(0.0, time.monotonic() - max(requested_at, available()))
        distinct = tuple(dict.fromkeys(errors))
        report.rollbacks.append(Rollback(seconds, done, distinct))
        if not done or seconds > 1.0:
            progress_log.error(
                f"rollback in {report.state}: {seconds:.2f} s, {'done' if done else 'failed'} {distinct[:3]}"
            )

    def refused(self, server: WholeServer, report: StateReport) -> None:
        """Request a rollback while the ledger is down: it must be refused, and at once."""
        requested_at, status, message = time.monotonic(), 200, ""
        try:
            with server.client(REFUSAL_SECONDS) as client:
                client.rollback(f"chaos: {report.state}", timeout=REFUSAL_SECONDS)
        except ServerError as error:
            status, message = error.status, str(error)[:200]
        report.refusals.append(Refusal(time.monotonic() - requested_at, status, message))
