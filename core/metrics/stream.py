"""Verbs of the stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Literal, get_args

from core.metrics import declared as d
from ratchet_client.errors import OutageState

STATES = ("ok", *get_args(OutageState))
WAITED_FOR = ("broker", "store", "registry")


class dependency:
    """Verbs of what all parts depend on."""

    @staticmethod
    def state(name: str, state: str) -> None:
        """A dependency is in one of :data:`STATES`."""
        for each in STATES:
            d.DEPENDENCY_STATE.labels(name, each).set(int(each == state))


class ingest:
    """Verbs of ingest and its sample store."""

    @staticmethod
    def received(records: int, size: int) -> None:
        """So many records of so many bytes were decided about: stored, found to be duplicates, or refused."""
        d.INGEST_RECORDS.inc(records)
        d.INGEST_BYTES.inc(size)

    @staticmethod
    def stored(count: int, split: str) -> None:
        """Samples of a split reached the store."""
        d.INGEST_STORED.labels(split).inc(count)

    @staticmethod
    def refused(reason: str) -> None:
        """A record went to quarantine."""
        d.INGEST_REFUSED.labels(reason).inc()

    @staticmethod
    def duplicates(count: int, kind: str) -> None:
        """Records were there already; kind is ``exact``, ``perceptual``, or ``older`` than what corrected it."""
        d.INGEST_DUPLICATES.labels(kind).inc(count)

    @staticmethod
    def corrected(count: int) -> None:
        """Samples were replaced by corrections of them."""
        d.INGEST_CORRECTED.inc(count)

    @staticmethod
    def lag(partition: int, records: int) -> None:
        """The store is so many records behind one partition."""
        d.INGEST_LAG.labels(str(partition)).set(records)

    @staticmethod
    def no_lag(partition: int) -> None:
        """A partition is not read here any more."""
        with suppress(KeyError):
            d.INGEST_LAG.remove(str(partition))

    @staticmethod
    def lost(offsets: int, reason: str) -> None:
        """Offsets were gone before they were read; reason is ``retention``."""
        d.INGEST_LOST.labels(reason).inc(offsets)

    @staticmethod
    def rewritten(offsets: int) -> None:
        """Offsets were cut off the log after they were stored."""
        d.INGEST_REWRITTEN.inc(offsets)

    @staticmethod
    def waiting(dependency: str) -> None:
        """Ingest waits for one of :data:`WAITED_FOR`, or for nothing."""
        for each in WAITED_FOR:
            d.INGEST_WAITING.labels(each).set(int(each == dependency))

    @staticmethod
    def settled(count: int) -> None:
        """So many samples that were stored twice are stored once again."""
        d.DOUBLES_SETTLED.inc(count)

    @staticmethod
    def committed(seconds: float) -> None:
        """One atomic commit took this long."""
        d.INGEST_COMMIT.observe(seconds)

    @staticmethod
    def quarantine_failing(failing: bool) -> None:
        """True if the newest refused record could not be put into the quarantine topic."""
        d.INGEST_QUARANTINE_FAILING.set(int(failing))

    @staticmethod
    def store(split_rows: Mapping[str, int], size: int, fragments: int) -> None:
        """Rows by split, bytes and fragments of the sample store."""
        for split, rows in split_rows.items():
            d.STORE_ROWS.labels(split).set(rows)
        d.STORE_BYTES.set(size)
        d.STORE_FRAGMENTS.set(fragments)


class events:
    """Verbs of the events that others are told of."""

    @staticmethod
    def published(type: str, count: int) -> None:
        """So many events of a type (``ratchet.release.v1`` counts as ``release``) are in their topic."""
        d.EVENTS_PUBLISHED.labels(type.removeprefix("ratchet.").removesuffix(".v1")).inc(count)

    @staticmethod
    def waiting(count: int) -> None:
        """So many are not in the topic yet."""
        d.EVENTS_WAITING.set(count)


class maintain:
    """Verbs of what keeps the sample store compact, and deletes."""

    @staticmethod
    def ran(outcome: Literal["done", "failed"], seconds: float) -> None:
        """A run of maintenance has ended."""
        d.MAINTAIN_RUNS.labels(outcome).inc()
        d.MAINTAIN_LAST.labels(outcome).set_to_current_time()
        d.MAINTAIN_SECONDS.observe(seconds)

    @staticmethod
    def written(size: int) -> None:
        """So many bytes were written again."""
        d.MAINTAIN_WRITTEN.inc(size)

    @staticmethod
    def versions(count: int) -> None:
        """So many versions of the store are kept."""
        d.MAINTAIN_VERSIONS.set(count)

    @staticmethod
    def deleted(count: int, reason: Literal["retention", "deletion"]) -> None:
        """So many samples left the store."""
        d.MAINTAIN_DELETED.labels(reason).inc(count)

    @staticmethod
    def collected(kind: str, size: int) -> None:
        """The garbage collector has deleted so many bytes of adapters, reports or another kind."""
        d.COLLECTED.labels(kind).inc(size)

    @staticmethod
    def deletions(waiting: int, oldest_seconds: float) -> None:
        """Deletions that are not complete, and the age of the oldest one (0 where there is none)."""
        d.DELETIONS_WAITING.set(waiting)
        d.DELETION_OLDEST.set(oldest_seconds)
