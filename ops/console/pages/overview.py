"""Is it healthy, what is live, is it learning, what does it cost."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from ops.console import charts
from ops.console.desk import Desk
from ops.console.drawing import duration
from ops.console.learning import lessons, purse
from ops.console.rollout import on_trial, watching
from ops.console.served import served_models
from ops.console.timeline import timeline
from ops.console.visit import Reader

router = APIRouter()


@router.get("/")
def overview(at: Reader) -> Response:
    """The page; its upper part asks again by itself."""
    found = at.desk.kept("overview", lambda: facts(at.desk))
    return at.page("overview.html", "Overview", chart=charts.learning(found["lessons"]), **found)


@router.get("/overview/now")
def now(at: Reader) -> Response:
    """What changes."""
    return at.part("overview_now.html", **at.desk.kept("overview", lambda: facts(at.desk)))


def facts(desk: Desk) -> dict[str, Any]:
    """From the ledger, the store and the server, each asked once for all viewers."""
    status, live, stream = desk.status(), desk.live(), desk.stream()
    learned = lessons(desk.ledger, limit=20)
    return {
        "server": status,
        "live": live,
        "trial": on_trial(live),
        "stable": desk.ledger.stable(),
        "engines": [
            f"{model.name}: {engine}"
            for model in served_models(status, live, desk.settings)
            for engine in model.engines
        ],
        "watch": watching(status, live),
        "held": desk.ledger.held(),
        "waiting": desk.ledger.pending_proposals(),
        "learning": desk.learning(),
        "lessons": learned,
        "current": next((lesson for lesson in learned if lesson.running), None),
        "judged": next((lesson for lesson in learned if lesson.verdict is not None), None),
        "purse": purse(desk.ledger, desk.settings),
        "samples": stream.samples,
        "stream": stream,
        "entries": timeline(desk.ledger, {}, limit=5),
        "problems": [*problems(status, public=desk.settings.console.public), *stream.problems()],
        "backfills": backfills(status),
    }


def backfills(status: dict[str, Any] | None) -> list[str]:
    """Spaces that are embedded for a release that is not live yet, in words."""
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
    """What is not well, in words; empty when all is.

    Args:
        public: without the messages of errors, which may name addresses and paths.
    """
    if status is None:
        return ["The model server does not answer."]
    found = []
    controller, catalog = status["controller"], status["catalog"]
    if not controller["started"]:
        found.append("No release is being served yet.")
    if controller["trouble"]:
        found.append("The last release could not be made" + ("." if public else f": {controller['trouble']}"))
    if vlm := status.get("vlm_problem"):
        found.append("Questions about pictures are not answered yet" + ("." if public else f": {vlm}"))
    live = max(controller["resident"], key=lambda row: row["release"], default=None)
    space = catalog["spaces"].get(live["image_space"]) if live else None
    if space is not None and space["coverage"] < 1:
        left = space.get("seconds_left")
        when = f", for about {duration(left)} more" if left else ""
        found.append(f"{space['coverage']:.0%} of the pictures can be found; the others are being prepared{when}.")
    return found
