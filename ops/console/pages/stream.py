"""The stream: what was read, where it came from, what was lost, refused and deleted."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console.pages.quarantine import WORDS
from ops.console.request_context import Reader
from ops.console.stream import COUNTED_SAMPLES, ORIGINS, deletion_counts, origins, row_counts

router = APIRouter()
COUNT_SECONDS = 60.0
"""Whole columns are scanned at most once in so long, however many look."""
GAP_SECONDS = 5.0
"""Gaps are looked for in the whole store at most once in so long."""
GAPS = 50
DELETIONS = 5


@router.get("/stream")
def stream(context: Reader) -> Response:
    """Counts, sources, gaps and deletions."""
    data = context.data
    state = data.stream()  # which does not wait for ever
    counts = data.cached("rows", lambda: row_counts(data.store))
    return context.page(
        "stream.html", "Stream", stream=state, counts=counts, most=COUNTED_SAMPLES, columns=ORIGINS,
        origins=data.cached("origins", lambda: origins(data.store), seconds=COUNT_SECONDS),
        gaps=data.cached("gaps", lambda: data.store.gaps(GAPS), seconds=GAP_SECONDS), gap_limit=GAPS,
        deletions=data.ledger.deletions(DELETIONS), deletion_counts=deletion_counts(data.ledger), reasons=WORDS,
    )  # fmt: skip
