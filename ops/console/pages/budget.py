"""What learning may cost, and what it did."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console import charts
from ops.console.request_context import Reader
from ops.console.update_summaries import budget_state, costs, update_summaries

router = APIRouter()
SHOWN = 50
SUMMED = 500
"""Updates over which costs are summed up."""
DAY = timedelta(days=1)


@router.get("/budget")
def budget(context: Reader) -> Response:
    """The bucket's level, and what each update took from it."""
    ledger, settings = context.data.ledger, context.data.settings
    summaries = update_summaries(ledger, limit=SUMMED)
    day = costs(summaries, datetime.now(UTC) - DAY)
    return context.page(
        "budget.html", "Budget", budget=budget_state(ledger, settings), updates=summaries[:SHOWN],
        chart=charts.spending(summaries), seconds=settings.budget.seconds_per_update,
        spans=(("Last 24 hours", day), (f"Last {SUMMED} updates", costs(summaries))),
    )  # fmt: skip
