"""Metrics of the stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, get_args

from core.metrics import declared as d
from ratchet_client.errors import OutageState

STATES = ("ok", *get_args(OutageState))
WAITED_FOR = ("broker", "store", "registry")


class dependency:
    @staticmethod
    def state(name: str, state: str) -> None:
        for each in STATES:
            d.DEPENDENCY_STATE.labels(name, each).set(int(each == state))


class ingest:
    @staticmethod
    def received(records: int, size: int) -> None:
        d.INGEST_RECORDS.inc(records)
        d.INGEST_BYTES.inc(size)

    @staticmethod
    def stored(count: int, split: str) -> None:
        d.INGEST_STORED.labels(split).inc(count)

    @staticmethod
    def refused(reason: str) -> None:
        d.INGEST_REFUSED.labels(reason).inc()

    @staticmethod
    def duplicates(count: int, kind: str) -> None:
        """Kind is ``exact``, ``perceptual``, or ``older`` than the record that corrected it."""
        d.INGEST_DUPLICATES.labels(kind).inc(count)

    @staticmethod
    def corrected(count: int) -> None:
        d.INGEST_CORRECTED.inc(count)

    @staticmethod
    def lag(partition: int, records: int) -> None:
        d.INGEST_LAG.labels(str(partition)).set(records)

    @staticmethod
    def no_lag(partition: int) -> None:
        with suppress(KeyError):
            d.INGEST_LAG.remove(str(partition))

    @staticmethod
    def lost(offsets: int, reason: str) -> None:
        d.INGEST_LOST.labels(reason).inc(offsets)

    @staticmethod
    def rewritten(offsets: int) -> None:
        d.INGEST_REWRITTEN.inc(offsets)

    @staticmethod
    def waiting(dependency: str) -> None:
        for each in WAITED_FOR:
            d.INGEST_WAITING.labels(each).set(int(each == dependency))

    @staticmethod
    def settled(count: int) -> None:
        d.DOUBLES_SETTLED.inc(count)

    @staticmethod
    def committed(seconds: float) -> None:
        d.INGEST_COMMIT.observe(seconds)

    @staticmethod
    def quarantine_failing(failing: bool) -> None:
        d.INGEST_QUARANTINE_FAILING.set(int(failing))

    @staticmethod
    def store(split_rows: Mapping[str, int], size: int, fragments: int) -> None:
        for split, rows in split_rows.items():
            d.STORE_ROWS.labels(split).set(rows)
        d.STORE_BYTES.set(size)
        d.STORE_FRAGMENTS.set(fragments)


class events:
    @staticmethod
    def published(type: str, count: int) -> None:
        """The label is the short type: ``release`` for ``ratchet.release.v1``."""
        d.EVENTS_PUBLISHED.labels(type.removeprefix("ratchet.").removesuffix(".v1")).inc(count)

    @staticmethod
    def waiting(count: int) -> None:
        d.EVENTS_WAITING.set(count)


class maintain:
    @staticmethod
    def ran(outcome: Literal["done", "failed"], seconds: float) -> None:
        d.MAINTAIN_RUNS.labels(outcome).inc()
        d.MAINTAIN_LAST.labels(outcome).set_to_current_time()
        d.MAINTAIN_SECONDS.observe(seconds)

    @staticmethod
    def written(size: int) -> None:
        d.MAINTAIN_WRITTEN.inc(size)

    @staticmethod
    def versions(count: int) -> None:
        d.MAINTAIN_VERSIONS.set(count)

    @staticmethod
    def deleted(count: int, reason: Literal["retention", "deletion"]) -> None:
        d.MAINTAIN_DELETED.labels(reason).inc(count)

    @staticmethod
    def collected(kind: str, size: int) -> None:
        d.COLLECTED.labels(kind).inc(size)

    @staticmethod
    def deletions(waiting: int, oldest_seconds: float) -> None:
        """Set the number of incomplete deletions, and the age of the oldest (0 if none)."""
        d.DELETIONS_WAITING.set(waiting)
        d.DELETION_OLDEST.set(oldest_seconds)
