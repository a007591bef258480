"""What is served: bases, adapters, embedding spaces, engines and precision."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console.served import loaded_releases, served_models
from ops.console.visit import Reader

router = APIRouter()


@router.get("/models")
def models(at: Reader) -> Response:
    """Each model of the live release, and the releases that are loaded."""
    status, live = at.desk.status(), at.desk.live()
    return at.page(
        "models.html", "Models", models=served_models(status, live, at.desk.settings), loaded=loaded_releases(status),
        away=status is None, live=live, catalog=None if status is None else status["catalog"],
    )  # fmt: skip
