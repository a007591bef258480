"""Try the models: find pictures by words or by a picture, sort one among words, ask questions about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Form
from fastapi.responses import Response

from ops.console.data import short_texts
from ops.console.pages.pictures import Picture, inline
from ops.console.request_context import Reader, Refused, RequestContext
from ratchet_client import Client, ServerError, data_uri

router = APIRouter()
Result = TypeVar("Result")
HITS = 12
ASK_SECONDS = 40.0
LABELS = "dog, cat, bird, flower, car, house, face, fruit"
MOST_LABELS = 32
Text = Annotated[str, Form(max_length=2000)]


@router.get("/playground")
def playground(context: Reader) -> Response:
    """The page."""
    examples = context.data.examples()
    questions = list(dict.fromkeys(row["question"] for row in examples if 3 <= len(row["question"]) <= 60))[:4]
    return context.page(
        "playground.html", "Playground", examples=examples, texts=short_texts(examples), questions=questions,
        labels=LABELS, away=context.data.status() is None, vlm=bool(context.data.settings.base.vlm),
    )  # fmt: skip


@router.post("/playground/search")
def search(context: Reader, text: Text = "") -> Response:
    """Pictures for words."""
    if not text.strip():
        raise Refused(400, "What are you looking for?", "", "Write some words, or take one of the suggestions.")
    found = ask_server(context, lambda client: client.post("/v1/search", {"text": text.strip(), "k": HITS}))
    return context.part("hits.html", found=found, title=f"Pictures for “{text.strip()}”")


@router.post("/playground/similar")
def similar(context: Reader, picture: Picture) -> Response:
    """Pictures for a picture."""
    found = ask_server(context, lambda client: client.post("/v1/search", {"image": data_uri(picture), "k": HITS}))
    return context.part("hits.html", found=found, title="Pictures like yours")


@router.post("/playground/classify")
def classify(context: Reader, picture: Picture, labels: Text = "") -> Response:
    """Which of these words fits best."""
    names = listed(labels)
    if len(names) < 2:
        raise Refused(400, "Give at least two words", "", "Write them with commas between.")
    body = {"images": [data_uri(picture)], "labels": names, "templates": ["a picture of a {}."]}
    found = ask_server(context, lambda client: client.post("/v1/classify", body))
    shares = sorted(found["data"][0]["probabilities"].items(), key=lambda pair: -pair[1])
    return context.part("shares.html", shares=shares, model=found["model"], picture=inline(context, picture, 96))


@router.post("/playground/ask")
def ask(context: Reader, picture: Picture, question: Text = "") -> Response:
    """An answer about the picture."""
    if not question.strip():
        raise Refused(400, "Ask a question", "", "For example: what is this?")
    found = ask_server(context, lambda client: client.vqa(picture, question.strip()))
    return context.part("answer.html", found=found, question=question.strip(), picture=inline(context, picture, 96))


def listed(labels: str) -> list[str]:
    """Words with commas between, each once."""
    return list(dict.fromkeys(label.strip()[:200] for label in labels.split(",") if label.strip()))[:MOST_LABELS]


def ask_server(context: RequestContext, call: Callable[[Client], dict[str, Any]]) -> dict[str, Any]:
    """What the server answers to the visitor. Raises Refused with its words."""
    try:
        with context.client(ASK_SECONDS) as client:
            return call(client)
    except ServerError as error:
        if error.status == 0:
            raise away() from None
        status = error.status if 400 <= error.status < 500 else 502
        raise Refused(status, "The server refused", error.message, error.fix) from None


def away() -> Refused:
    """The server cannot be reached."""
    return Refused(
        502, "The model server does not answer", "It may be starting, or it was stopped.",
        "Try again in a moment; `ratchet status` tells more.",
    )  # fmt: skip
