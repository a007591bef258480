"""Metrics of the stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, get_args

from core.metrics import declared as d
from ratchet_client.errors import OutageState

STATES = ("ok", *get_args(OutageState))


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

    corrected = d.INGEST_CORRECTED.inc

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

    rewritten = d.INGEST_REWRITTEN.inc

    @staticmethod
    def waiting(dependency: str) -> None:
        for each in ("broker", "store", "registry"):
            d.INGEST_WAITING.labels(each).set(int(each == dependency))

    settled = d.DOUBLES_SETTLED.inc
    committed = d.INGEST_COMMIT.observe
    quarantine_failing = d.INGEST_QUARANTINE_FAILING.set

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

    waiting = d.EVENTS_WAITING.set


class maintain:
    @staticmethod
    def ran(outcome: Literal["done", "failed"], seconds: float) -> None:
        d.MAINTAIN_RUNS.labels(outcome).inc()
        d.MAINTAIN_LAST.labels(outcome).set_to_current_time()
        d.MAINTAIN_SECONDS.observe(seconds)

    written = d.MAINTAIN_WRITTEN.inc
    versions = d.MAINTAIN_VERSIONS.set

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

    @staticmethod
    def indexes(problems: Mapping[str, str]) -> None:
        """Set which indexes outside are not kept up to date, by :meth:`core.ledger.Ledger.index_problems`."""
        d.INDEX_FAILING.clear()
        for name, problem in problems.items():
            d.INDEX_FAILING.labels(name).set(bool(problem))
