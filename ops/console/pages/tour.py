"""The tour as a page of its own: help for those who skipped it, or have no script."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console.visit import Reader

router = APIRouter()


@router.get("/tour")
def tour(at: Reader) -> Response:
    """All steps."""
    return at.page("tour.html", "Tour")
