"""What learning may cost, and what it did."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console import charts
from ops.console.learning import lessons, purse
from ops.console.visit import Reader

router = APIRouter()


@router.get("/budget")
def budget(at: Reader) -> Response:
    """The bucket's level, and what each update took from it."""
    learned = lessons(at.desk.ledger, limit=50)
    return at.page(
        "budget.html", "Budget", purse=purse(at.desk.ledger, at.desk.settings), lessons=learned,
        chart=charts.spending(learned), seconds=at.desk.settings.budget.seconds_per_update,
    )  # fmt: skip
