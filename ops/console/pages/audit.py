"""Who did what, when and why."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from ops.console.request_context import Reader

router = APIRouter()
STEP = 100
MOST = 2000


@router.get("/audit")
def audit(
    context: Reader,
    about: Annotated[str, Query(max_length=200)] = "",
    actor: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=MOST)] = STEP,
) -> Response:
    """The newest rows; of one actor, or about one thing."""
    rows = context.data.ledger.audit_rows(limit + 1, subject=about.strip() or None, actor=actor.strip() or None)
    more = min(limit + STEP, MOST) if len(rows) > limit < MOST else 0
    return context.page("audit.html", "Audit", rows=rows[:limit], about=about, actor=actor, more=more)
