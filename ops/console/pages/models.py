"""What is served: bases, adapters, embedding spaces, engines and precision."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console.request_context import Reader
from ops.console.served import loaded_releases, served_models

router = APIRouter()


@router.get("/models")
def models(context: Reader) -> Response:
    """Each model of the live release, and the releases that are loaded."""
    data = context.data
    status, live = data.status(), data.live()
    return context.page(
        "models.html", "Models", models=served_models(status, live, data.settings), loaded=loaded_releases(status),
        away=status is None, live=live, catalog=None if status is None else status["catalog"],
    )  # fmt: skip
