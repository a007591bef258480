"""The page Stream: what was read, from where, and what was lost, quarantined and deleted."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from core.ledger import DeletionState
from ops.console.pages.quarantine import WORDS
from ops.console.request_context import Reader
from streams.store.sample_queries import count_values, quarantine_counts
from streams.store.sample_store import SampleStore

router = APIRouter()
COUNT_SECONDS = 60.0
"""Minimum interval between scans of whole columns, for all viewers together."""
COUNTED_SAMPLES = 2_000_000
"""Larger stores are not counted by topic, domain and source, which scans three columns of every row."""
TOP = 12
ORIGINS = ("topic", "domain", "source")
GAP_SECONDS = 5.0
"""Minimum interval between scans of the store for gaps."""
GAPS = 50
DELETIONS = 5
DELETION_STATES: tuple[DeletionState, ...] = ("requested", "removed", "held", "done")


@router.get("/stream")
def stream(context: Reader) -> Response:
    data, ledger = context.data, context.data.ledger
    state = data.stream()  # bounded in time
    return context.page(
        "stream.html", "Stream", stream=state, counts=data.cached("rows", data.store.tally), most=COUNTED_SAMPLES,
        columns=ORIGINS, origins=data.cached("origins", lambda: origins(data.store), seconds=COUNT_SECONDS),
        gaps=data.cached("gaps", lambda: data.store.gaps(GAPS), seconds=GAP_SECONDS), gap_limit=GAPS, reasons=WORDS,
        deletions=ledger.deletions(DELETIONS),
        deletion_counts={each: ledger.count_deletions(states=[each]) for each in DELETION_STATES},
    )  # fmt: skip


def origins(store: SampleStore) -> dict[str, Any]:
    """Sample counts by value for each of :data:`ORIGINS` in use (none if the store is too large), and numbers of
    quarantined records by reason. Scans the columns. Raises StoreUnavailable."""
    samples: dict[str, list[tuple[str, int]]] = {}
    if store.count() <= COUNTED_SAMPLES:
        counts = count_values(store, "kind = 'sample'", ORIGINS)
        samples = {name: values.top(TOP) for name, values in counts.items() if set(values.counts) - {""}}
    return {"samples": samples, "refusals": quarantine_counts(store)["reason"].counts.most_common()}
