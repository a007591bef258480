"""The stream: what was read, where it came from, what was lost, refused and deleted."""

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
"""Whole columns are scanned at most once in so long, however many look."""
COUNTED_SAMPLES = 2_000_000
"""In a larger store samples are not counted by topic, domain and source: that scans three columns of every row."""
TOP = 12
"""Values that are shown of each column, those with the most samples first."""
ORIGINS = ("topic", "domain", "source")
GAP_SECONDS = 5.0
"""Gaps are looked for in the whole store at most once in so long."""
GAPS = 50
DELETIONS = 5
DELETION_STATES: tuple[DeletionState, ...] = ("requested", "removed", "held", "done")


@router.get("/stream")
def stream(context: Reader) -> Response:
    """Counts, sources, gaps and deletions."""
    data, ledger = context.data, context.data.ledger
    state = data.stream()  # which does not wait for ever
    return context.page(
        "stream.html", "Stream", stream=state, counts=data.cached("rows", data.store.tally), most=COUNTED_SAMPLES,
        columns=ORIGINS, origins=data.cached("origins", lambda: origins(data.store), seconds=COUNT_SECONDS),
        gaps=data.cached("gaps", lambda: data.store.gaps(GAPS), seconds=GAP_SECONDS), gap_limit=GAPS, reasons=WORDS,
        deletions=ledger.deletions(DELETIONS),
        deletion_counts={each: ledger.count_deletions(states=[each]) for each in DELETION_STATES},
    )  # fmt: skip


def origins(store: SampleStore) -> dict[str, Any]:
    """Sources of samples, counted by value for each of :data:`ORIGINS` that some sample has (none where the store
    is too large to count), and the number of refused records by reason. Scans the columns. Raises StoreUnavailable.
    """
    samples: dict[str, list[tuple[str, int]]] = {}
    if store.count() <= COUNTED_SAMPLES:
        counts = count_values(store, "kind = 'sample'", ORIGINS)
        samples = {name: values.top(TOP) for name, values in counts.items() if set(values.counts) - {""}}
    return {"samples": samples, "refusals": quarantine_counts(store)["reason"].counts.most_common()}
