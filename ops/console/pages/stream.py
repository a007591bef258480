"""The stream: what was read, where it came from, what was lost, refused and deleted."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console.pages.quarantine import WORDS
from ops.console.stream import COUNTED_SAMPLES, ORIGINS, deletion_counts, origins, row_counts
from ops.console.visit import Reader

router = APIRouter()
COUNT_SECONDS = 60.0
"""Whole columns are scanned at most once in so long, however many look."""
GAPS = 50
DELETIONS = 5


@router.get("/stream")
def stream(at: Reader) -> Response:
    """Counts, sources, gaps and deletions."""
    desk = at.desk
    counts = desk.kept("rows", lambda: row_counts(desk.store))
    return at.page(
        "stream.html", "Stream", stream=desk.stream(), counts=counts, most=COUNTED_SAMPLES, columns=ORIGINS,
        origins=desk.kept("origins", lambda: origins(desk.store), seconds=COUNT_SECONDS),
        gaps=desk.store.gaps(GAPS) if counts.lost else [], gap_limit=GAPS,
        deletions=desk.ledger.deletions(DELETIONS), deletion_counts=deletion_counts(desk.ledger), reasons=WORDS,
    )  # fmt: skip
