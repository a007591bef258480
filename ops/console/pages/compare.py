"""Two resident releases side by side, asked the same at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import mul
from typing import Annotated, Any

from fastapi import APIRouter, Form
from fastapi.responses import Response

from core.errors import RatchetError
from ops.console.pages.pictures import Chosen, inline
from ops.console.pages.playground import ASK_SECONDS, LABELS, Text, away, listed
from ops.console.request_context import Reader, Refused
from ratchet_client import Client

router = APIRouter()
HITS = 6
TEMPLATES = ["a picture of a {}."]
QUESTION = "what is this?"


@dataclass
class Side:
    """What one release says. What was not asked, or failed, is None; failures are in ``trouble``."""

    number: int
    row: dict[str, Any]
    similarity: float | None = None
    shares: list[tuple[str, float]] | None = None
    hits: list[dict[str, Any]] | None = None
    answer: str | None = None
    trouble: list[str] = field(default_factory=list)


@router.get("/compare")
def compare(context: Reader) -> Response:
    """The form."""
    resident = context.data.resident_releases(fresh=True)
    live = context.data.live()
    return context.page(
        "compare.html", "Compare", resident=sorted(resident.items(), reverse=True), live=live.number if live else 0,
        examples=context.data.examples(), labels=LABELS, question=QUESTION, away=context.data.status() is None,
        vlm=bool(context.data.settings.base.vlm),
    )  # fmt: skip


@router.post("/compare")
def compared(
    context: Reader,
    picture: Chosen,
    left: Annotated[int, Form()],
    right: Annotated[int, Form()],
    text: Text = "",
    labels: Text = "",
    question: Text = "",
) -> Response:
    """Both answers."""
    if picture is None and not text.strip():
        raise Refused(400, "Nothing to compare", "", "Choose a picture, or write some words.")
    if picture is not None and context.data.draw(picture, 64) is None:
        raise Refused(400, "This is no picture that can be read", "", "Use a whole PNG, JPEG, WebP, GIF or BMP file.")
    resident = context.data.resident_releases(fresh=True)
    if context.data.status() is None:
        raise away()
    gone = [number for number in (left, right) if number not in resident]
    if gone:
        raise Refused(
            409,
            f"Release {gone[0]} is not loaded any more",
            "Only the newest releases can be asked.",
            "Reload the page.",
        )
    sides = [Side(number, resident[number]) for number in (left, right)]
    names = listed(labels)
    vlm = question.strip() if context.data.settings.base.vlm else ""
    with context.client(ASK_SECONDS) as client, ThreadPoolExecutor(4) as pool:
        asks = [each for side in sides for each in _asks(client, side, picture, text.strip(), names, vlm)]
        running: list[tuple[Side, Future[None]]] = [(side, pool.submit(ask)) for side, ask in asks]
    for side, done in running:
        error = done.exception()
        if isinstance(error, RatchetError):
            side.trouble.append(error.message)
        elif error is not None:
            raise error
    return context.part(
        "compared.html", sides=sides, text=text.strip(),
        picture=inline(context, picture) if picture is not None else "",
        question=vlm if picture is not None else "", same=_same(sides),
    )  # fmt: skip


def _asks(
    client: Client, side: Side, picture: bytes | None, text: str, labels: list[str], question: str
) -> list[tuple[Side, Callable[[], None]]]:
    """What is asked of one side; each call writes its result there."""
    clip, vlm = f"clip@{side.number}", f"vlm@{side.number}"

    def similarity() -> None:
        side.similarity = sum(map(mul, *client.embed([picture or b"", text], model=clip)))

    def shares() -> None:
        (found,) = client.classify([picture or b""], labels, TEMPLATES, model=clip)
        side.shares = sorted(found["probabilities"].items(), key=lambda pair: -pair[1])[:6]

    def hits() -> None:
        side.hits = client.search(text=text or None, image=None if text else picture, k=HITS, model=clip)

    def answer() -> None:
        side.answer = client.vqa(picture or b"", question, model=vlm)["answer"]

    calls: list[Callable[[], None]] = [hits]
    if picture is not None:
        calls += [similarity] if text else []
        calls += [shares] if len(labels) > 1 else []
        calls += [answer] if question else []
    return [(side, call) for call in calls]


def _same(sides: list[Side]) -> list[str]:
    """Models that both releases share: there the answers are equal by construction."""
    one, other = (side.row for side in sides)
    pairs = (("CLIP", "adapter"), ("VLM", "vlm"))
    return [name for name, key in pairs if one.get(key) == other.get(key)]
