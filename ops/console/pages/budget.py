"""What learning may cost, and what it did."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console import charts
from ops.console.learning import costs, lessons, purse
from ops.console.visit import Reader

router = APIRouter()
SHOWN = 50
SUMMED = 500
"""Updates over which costs are summed up."""
DAY = timedelta(days=1)


@router.get("/budget")
def budget(at: Reader) -> Response:
    """The bucket's level, and what each update took from it."""
    learned = lessons(at.desk.ledger, limit=SUMMED)
    return at.page(
        "budget.html", "Budget", purse=purse(at.desk.ledger, at.desk.settings), lessons=learned[:SHOWN],
        chart=charts.spending(learned), seconds=at.desk.settings.budget.seconds_per_update,
        spans=(("Last 24 hours", costs(learned, datetime.now(UTC) - DAY)), (f"Last {SUMMED} updates", costs(learned))),
    )  # fmt: skip
