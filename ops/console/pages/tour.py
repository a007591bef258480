"""The tour as a page of its own: help for those who skipped it, or have no script."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console.request_context import Reader

router = APIRouter()


@router.get("/tour")
def tour(context: Reader) -> Response:
    """All steps."""
    return context.page("tour.html", "Tour")
