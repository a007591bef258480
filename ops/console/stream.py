"""What came in by the stream: counts of rows, where samples came from, what was lost, and what was deleted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from core.ledger import DeletionState, Ledger
from streams.store.sample_queries import count_values, refusal_counts
from streams.store.sample_store import SampleStore

COUNTED_SAMPLES = 2_000_000
"""In a larger store samples are not counted by topic, domain and source: that scans three columns of every row."""
TOP = 12
"""Values that are shown of each column, those with the most samples first."""
ORIGINS = ("topic", "domain", "source")
DELETION_STATES: tuple[DeletionState, ...] = ("requested", "removed", "held", "done")


@dataclass(frozen=True)
class Origins:
    """Where samples came from, and why records were refused."""

    samples: dict[str, list[tuple[str, int]]]
    """Number of samples by value, for each of :data:`ORIGINS` that some sample has; empty where the store is too large
    to count."""
    refusals: list[tuple[str, int]]
    """Number of refused records by reason."""


@dataclass(frozen=True)
class RowCounts:
    """Rows of the store by kind, from its tally."""

    samples: int
    train: int
    fresh_eval: int
    duplicates: int
    refused: int
    deleted: int
    lost: int
    """Offsets that were gone before they were read."""
    image_bytes: int


def row_counts(store: SampleStore) -> RowCounts:
    """No scan is needed. Raises StoreUnavailable."""
    tally = store.tally()
    return RowCounts(
        samples=tally["sample"],
        train=tally["train"],
        fresh_eval=tally["fresh_eval"],
        duplicates=tally["duplicate"],
        refused=tally["quarantine"],
        deleted=tally["deleted"],
        lost=tally["gap_offsets"],
        image_bytes=tally["bytes"],
    )


def origins(store: SampleStore) -> Origins:
    """Scans the columns that it counts. Raises StoreUnavailable."""
    samples: dict[str, list[tuple[str, int]]] = {}
    if store.count() <= COUNTED_SAMPLES:
        counts = count_values(store, "kind = 'sample'", ORIGINS)
        samples = {name: values.top(TOP) for name, values in counts.items() if set(values.counts) - {""}}
    reasons: Counter[str] = refusal_counts(store)["reason"].counts
    return Origins(samples, reasons.most_common())


def deletion_counts(ledger: Ledger) -> dict[DeletionState, int]:
    """Number of deletions in each state."""
    return {state: ledger.count_deletions(states=[state]) for state in DELETION_STATES}
