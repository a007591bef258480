"""Tries the models: searches by words or picture, classification, questions; and compares two releases."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import mul
from typing import Annotated, Any

from fastapi import APIRouter, Form
from fastapi.responses import Response

from core.errors import RatchetError
from ops.console.data import short_texts
from ops.console.pages.pictures import Chosen, Picture, inline, readable
from ops.console.request_context import ErrorPage, Reader, RequestContext
from ratchet_client import Client, ServerError, data_uri

router = APIRouter()
HITS = 12
HITS_COMPARED = 6
ASK_SECONDS = 40.0
LABELS = "dog, cat, bird, flower, car, house, face, fruit"
MOST_LABELS = 32
TEMPLATES = ["a picture of a {}."]
QUESTION = "what is this?"
Text = Annotated[str, Form(max_length=2000)]


@router.get("/playground")
def playground(context: Reader) -> Response:
    examples = context.data.examples()
    return context.page(
        "playground.html", "Playground", examples=examples, texts=short_texts(examples),
        questions=short_texts(examples, "question", 4, 60), labels=LABELS, away=context.data.status() is None,
        vlm=bool(context.data.settings.base.vlm),
    )  # fmt: skip


@router.post("/playground/search")
def search(context: Reader, text: Text = "") -> Response:
    if not text.strip():
        raise ErrorPage(400, "What are you looking for?", "", "Write some words, or take one of the suggestions.")
    found = ask_server(context, lambda client: client.post("/v1/search", {"text": text.strip(), "k": HITS}))
    return context.part("hits.html", found=found, title=f"Pictures for “{text.strip()}”")


@router.post("/playground/similar")
def similar(context: Reader, picture: Picture) -> Response:
    found = ask_server(context, lambda client: client.post("/v1/search", {"image": data_uri(picture), "k": HITS}))
    return context.part("hits.html", found=found, title="Pictures like yours")


@router.post("/playground/classify")
def classify(context: Reader, picture: Picture, labels: Text = "") -> Response:
    names = listed(labels)
    if len(names) < 2:
        raise ErrorPage(400, "Give at least two words", "", "Write them with commas between.")
    body = {"images": [data_uri(picture)], "labels": names, "templates": TEMPLATES}
    found = ask_server(context, lambda client: client.post("/v1/classify", body))
    shares = sorted(found["data"][0]["probabilities"].items(), key=lambda pair: -pair[1])
    return context.part("shares.html", shares=shares, model=found["model"], picture=inline(context, picture))


@router.post("/playground/ask")
def ask(context: Reader, picture: Picture, question: Text = "") -> Response:
    if not question.strip():
        raise ErrorPage(400, "Ask a question", "", "For example: what is this?")
    found = ask_server(context, lambda client: client.vqa(picture, question.strip()))
    return context.part("answer.html", found=found, question=question.strip(), picture=inline(context, picture))


def listed(labels: str) -> list[str]:
    return list(dict.fromkeys(label.strip()[:200] for label in labels.split(",") if label.strip()))[:MOST_LABELS]


def ask_server(context: RequestContext, call: Callable[[Client], dict[str, Any]]) -> dict[str, Any]:
    """The server's answer to the visitor. Raises ErrorPage with its message."""
    try:
        with context.client(ASK_SECONDS) as client:
            return call(client)
    except ServerError as error:
        if error.status == 0:
            raise away() from None
        status = error.status if 400 <= error.status < 500 else 502
        raise ErrorPage(status, "The server refused", error.message, error.fix) from None


def away() -> ErrorPage:
    return ErrorPage(
        502, "The model server does not answer", "It may be starting, or it was stopped.",
        "Try again in a moment; `ratchet status` tells more.",
    )  # fmt: skip


@dataclass
class Side:
    """Answers of one release. None: not asked, or failed; failures are in ``trouble``."""

    number: int
    row: dict[str, Any]
    similarity: float | None = None
    shares: list[tuple[str, float]] | None = None
    hits: list[dict[str, Any]] | None = None
    answer: str | None = None
    trouble: list[str] = field(default_factory=list)


@router.get("/compare")
def compare(context: Reader) -> Response:
    resident = context.data.resident_releases(fresh=True)
    live = context.data.ledger.live()
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
    if picture is None and not text.strip():
        raise ErrorPage(400, "Nothing to compare", "", "Choose a picture, or write some words.")
    if picture is not None:
        readable(context, picture)
    resident = context.data.resident_releases(fresh=True)
    if context.data.status() is None:
        raise away()
    for number in (left, right):
        if number not in resident:
            title = f"Release {number} is not loaded any more"
            raise ErrorPage(409, title, "Only the newest releases can be asked.", "Reload the page.")
    sides = [Side(number, resident[number]) for number in (left, right)]
    names = listed(labels)
    vlm = question.strip() if context.data.settings.base.vlm else ""
    with context.client(ASK_SECONDS) as client, ThreadPoolExecutor(4) as pool:
        asked = [
            (side, pool.submit(ask)) for side in sides for ask in _asks(client, side, picture, text.strip(), names, vlm)
        ]
    for side, done in asked:
        error = done.exception()
        if isinstance(error, RatchetError):
            side.trouble.append(error.message)
        elif error is not None:
            raise error
    keys = {"CLIP": "adapter", "VLM": "vlm"}
    same = [name for name, key in keys.items() if sides[0].row.get(key) == sides[1].row.get(key)]  # equal answers
    question = vlm if picture is not None else ""
    return context.part("compared.html", sides=sides, text=text.strip(), question=question, same=same)


def _asks(
    client: Client, side: Side, picture: bytes | None, text: str, labels: list[str], question: str
) -> list[Callable[[], None]]:
    """Calls to one release; each writes its result to ``side``."""
    clip, vlm = f"clip@{side.number}", f"vlm@{side.number}"

    def similarity() -> None:
        side.similarity = sum(map(mul, *client.embed([picture or b"", text], model=clip)))

    def shares() -> None:
        (found,) = client.classify([picture or b""], labels, TEMPLATES, model=clip)
        side.shares = sorted(found["probabilities"].items(), key=lambda pair: -pair[1])[:6]

    def hits() -> None:
        side.hits = client.search(text=text or None, image=None if text else picture, k=HITS_COMPARED, model=clip)

    def answer() -> None:
        side.answer = client.vqa(picture or b"", question, model=vlm)["answer"]

    calls: list[Callable[[], None]] = [hits]
    if picture is not None:
        calls += [similarity] if text else []
        calls += [shares] if len(labels) > 1 else []
        calls += [answer] if question else []
    return calls
