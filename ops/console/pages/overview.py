"""The page Overview (health, live release, learning, cost), and the tour."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console.data import ConsoleData
from ops.console.pages.budget import budget_state, learning, update_summaries
from ops.console.pages.models import served_models
from ops.console.request_context import ErrorPage, Reader
from ops.console.template_filters import duration
from ops.console.timeline import on_trial, timeline, watching

router = APIRouter()


@router.get("/")
def overview(context: Reader) -> Response:
    overview_facts = context.data.cached("overview", lambda: facts(context.data))
    return context.page("overview.html", "Overview", chart=learning(overview_facts["updates"]), **overview_facts)


@router.get("/overview/now")
def now(context: Reader) -> Response:
    return context.part("overview_now.html", **context.data.cached("overview", lambda: facts(context.data)))


@router.get("/tour")
def tour(context: Reader) -> Response:
    """The tour as a page, for those who skipped it or have no scripts."""
    if context.public:
        raise ErrorPage(404, "There is no such page", "A public console has no tour.")
    return context.page("tour.html", "Tour")


def facts(data: ConsoleData) -> dict[str, Any]:
    status, live, stream = data.status(), data.ledger.live(), data.stream()
    summaries = update_summaries(data.ledger, limit=20)
    return {
        "server": status,
        "live": live,
        "trial": on_trial(live),
        "stable": data.ledger.stable(),
        "engines": [
            f"{model.name}: {engine}"
            for model in served_models(status, live, data.settings)
            for engine in model.engines
        ],
        "watch": watching(status, live),
        "held": data.ledger.held(),
        "waiting": data.ledger.pending_proposals(),
        "learning": data.learning(),
        "updates": summaries,
        "current": next((summary for summary in summaries if summary.running), None),
        "judged": next((summary for summary in summaries if summary.verdict is not None), None),
        "budget": budget_state(data.ledger, data.settings),
        "samples": stream.samples,
        "stream": stream,
        "entries": timeline(data.ledger, {}, limit=5),
        "problems": [*problems(status, public=data.settings.console.public), *stream.problems()],
        "backfills": backfills(status),
    }


def backfills(status: dict[str, Any] | None) -> list[str]:
    """Progress in words of spaces that are embedded for the next release."""
    if status is None:
        return []
    resident = {row["image_space"] for row in status["controller"]["resident"]}
    return [
        f"The pictures are being prepared for the next release: {space['coverage']:.0%}"
        + (f", about {duration(space['seconds_left'])} more." if space.get("seconds_left") else ".")
        for name, space in status["catalog"]["spaces"].items()
        if name not in resident and space["coverage"] < 1
    ]


def problems(status: dict[str, Any] | None, *, public: bool = False) -> list[str]:
    """Problems of the server in words. ``public``: without error messages, which may contain addresses and paths."""
    if status is None:
        return ["The model server does not answer."]
    messages = []
    controller, catalog = status["controller"], status["catalog"]
    if not controller["started"]:
        messages.append("No release is being served yet.")
    if controller["trouble"]:
        messages.append("The last release could not be made" + ("." if public else f": {controller['trouble']}"))
    if vlm := status.get("vlm_problem"):
        messages.append("Questions about pictures are not answered yet" + ("." if public else f": {vlm}"))
    live = max(controller["resident"], key=lambda row: row["release"], default=None)
    space = catalog["spaces"].get(live["image_space"]) if live else None
    if space is not None and space["coverage"] < 1:
        left = space.get("seconds_left")
        when = f", for about {duration(left)} more" if left else ""
        messages.append(f"{space['coverage']:.0%} of the pictures can be found; the others are being prepared{when}.")
    return messages
