"""POST /v1/rerank, as Cohere, Jina and vLLM have it: documents in the order of a score, the VLM's probability of "yes",
against "no", to the question whether they match a query. The VLM sees each pair by itself, so a score does not depend
on the other documents. ``/v1/search`` has its first hits reranked by :func:`reranked`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import ConfigDict, Discriminator, FailFast, Field, Tag

from serving.engines.vlm.generation import ABOUT_IMAGE, CHOICES, GenerationRequest, Image, Message, question
from serving.errors import InvalidRequest
from serving.http.app_state import VLM, AppState, app_state
from serving.http.auth import require
from serving.http.bodies import VLM_MODEL, Body, OpenAIBody, ResponseBody, json_body, json_response, json_schema
from serving.http.embeddings import Input, Item, as_input
from serving.http.errors import ApiError, field_error
from serving.http.image_loader import gathered
from serving.http.request_bodies import caller_of
from serving.http.vqa import normalised
from serving.messages import IMAGES_PER_REQUEST, TEXTS_PER_REQUEST
from serving.releases.types import ReleaseSnapshot

router = APIRouter(tags=["Search"])
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
INSTRUCT = "<Instruct>: Given a search query, retrieve relevant candidates that answer the query.<Query>:"
"""The prompt of Qwen3-VL-Reranker and its like, for pairs that are not a text and an image."""
RERANK = Field(
    0, ge=0, le=IMAGES_PER_REQUEST,
    description="How many of the nearest hits the VLM orders anew, by its probability that they match: slower, often "
    "better. Needs the scope `infer`.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SampleImage:
    """The image of a sample, not read yet. ``place``: in the request."""

    place: str
    id: str


class SampleItem(OpenAIBody, Body):
    """The image of a sample: {"id": "64 hex digits"}. Needs the scope `search`."""

    id: str = Field(pattern="^[0-9a-f]{64}$", json_schema_extra={"format": "sample"})


def _document_kind(value: Any) -> str:
    return "<id>" if isinstance(value, dict) and "id" in value and "text" not in value else "<item>"


Document = Annotated[Annotated[Item, Tag("<item>")] | Annotated[SampleItem, Tag("<id>")], Discriminator(_document_kind)]


class RerankRequest(OpenAIBody):
    """A query, and documents to order. Fields of Cohere and vLLM that this server does not know are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "examples": [
                {"model": "vlm", "query": "a red bus", "documents": [{"image": "data:image/png;base64,iVBOR..."}]},
                {"model": "vlm", "query": "which animal barks?", "documents": ["a dog", "a cat"], "top_n": 1},
            ]
        },
    )  # fmt: skip
    query: Item = Field(description="A text, or an image object.")
    documents: Annotated[list[Document], FailFast()] = Field(
        min_length=1, max_length=TEXTS_PER_REQUEST,
        description=f"Texts, images (at most {IMAGES_PER_REQUEST}, samples among them) or samples: `{{\"id\": ...}}`.",
    )  # fmt: skip
    top_n: int | None = Field(None, ge=1, description="Number of results; default: all.")
    return_documents: bool = Field(False, description="Whether each result has its document, as it was sent.")
    model: str = VLM_MODEL


class RerankResult(ResponseBody):
    """A document's score."""

    index: int
    """Position of the document in the request."""
    relevance_score: float
    """Probability of "yes", from 0 to 1."""
    document: dict[str, Any] | None = None
    """With `return_documents`: as it was sent, a text as `{"text": ...}`; else left out."""


class RerankResults(ResponseBody):
    """Documents, the best first."""

    id: str
    model: str
    """`vlm@` and the number of the release."""
    results: list[RerankResult]


@router.post("/v2/rerank", include_in_schema=False)
@router.post("/rerank", include_in_schema=False)
@router.post(
    "/v1/rerank", summary="Order documents by a query", response_model=RerankResults,
    openapi_extra=json_schema(RerankRequest),
)  # fmt: skip
async def rerank(request: Request) -> Response:
    """Scores of documents for a query by the VLM, the best first; of equal ones the first in the request. Also at
    `/rerank` and `/v2/rerank`, where Cohere's and vLLM's clients look for it.
    """
    state = app_state(request)
    state.need_vlms()
    body = await json_body(request, RerankRequest)
    documents = [_document(f"documents.{index}", each) for index, each in enumerate(body.documents)]
    if any(isinstance(each, SampleImage) for each in documents):
        require(request, "search")
    async with state.answering(request, body.model, VLM) as (snapshot, deadline):
        query = as_input("query", body.query)
        scores = await relevance(state, snapshot, query, documents, deadline, caller_of(request.scope))
        if None in scores:
            problem = "there is no such sample, or its image cannot be read."
            raise field_error(f"documents.{scores.index(None)}.id", problem, "sample_not_found", 404)
        rows = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
        results: list[dict[str, Any]] = sorted(rows, key=lambda row: -float(row["relevance_score"] or 0))[: body.top_n]
        if body.return_documents:
            results = [row | {"document": _shown(body.documents[row["index"]])} for row in results]
        answer = {"id": f"rerank-{os.urandom(12).hex()}", "model": f"vlm@{snapshot.release}", "results": results}
        return json_response(answer, state.headers(request, "rerank", snapshot, VLM))


def _document(place: str, document: Document) -> Input | SampleImage:
    return SampleImage(f"{place}.id", document.id) if isinstance(document, SampleItem) else as_input(place, document)


def _shown(document: Document) -> dict[str, Any]:
    return {"text": document} if isinstance(document, str) else document.model_dump(exclude_unset=True)


async def reranked(
    request: Request, snapshot: ReleaseSnapshot, query: Input, rows: list[dict[str, Any]], k: int, deadline: float
) -> list[dict[str, Any]]:
    """Hits of a search: the first ``k`` as the same release's VLM orders them, with a ``relevance_score``;
    then the others. Raises ApiError without a VLM or the scope `infer`, and as :func:`relevance`."""
    require(request, "infer")
    images = [SampleImage(f"hit {row['id']}", row["id"]) for row in rows[:k]]
    state, caller = app_state(request), caller_of(request.scope)
    scores = await relevance(state, snapshot, query, images, deadline, caller, "rerank")
    for row, score in zip(rows, scores, strict=False):
        row |= {} if score is None else {"relevance_score": score}  # None: deleted meanwhile
    return sorted(rows[:k], key=lambda row: -float(row.get("relevance_score", -1))) + rows[k:]


async def relevance(
    state: AppState,
    snapshot: ReleaseSnapshot,
    query: Input,
    documents: Sequence[Input | SampleImage],
    deadline: float,
    caller: str,
    param: str = "model",
) -> list[float | None]:
    """The snapshot's VLM's probability of yes for each document; None for a sample that is not there or whose image
    cannot be read. Images are decoded pair by pair: memory does not grow
    with the documents, and no pair waits for room while it holds some. Raises ApiError with the place of what cannot be
    judged, or without a VLM (``param``: the field that asked for one); QueueFull, DeadlineExceeded, Unavailable."""
    vlms, loader = state.need_vlms(param), state.image_loader
    turns = asyncio.Semaphore(max(1, vlms.limit // 8))  # a batch: others' requests to the VLM get in between
    places = [f"documents.{index}" for index in range(len(documents))]
    for place, each in zip(["query", *places], [query, *documents], strict=True):
        if isinstance(each, str):
            if not each:
                raise field_error(place, "the text is empty.", "empty_text")
            state.check_length(place, each)
    if (pictured := sum(not isinstance(each, str) for each in documents)) > IMAGES_PER_REQUEST:
        problem = f"{pictured} images, samples among them, are more than {IMAGES_PER_REQUEST}."
        raise field_error("documents", problem, "too_many_images")
    images = await loader.fetched([each for each in (query, *documents) if isinstance(each, tuple)])
    if images:
        await loader.inspect(images, caller)  # a wrong one is told before anything is computed
    sources = dict(images)

    async def loaded(each: Input | SampleImage) -> Input:
        if isinstance(each, str):
            return each
        if isinstance(each, tuple):
            return each[0], sources[each[0]]
        if (image := await state.index.image(each.id)) is None:
            raise field_error(each.place, "there is no such sample.", "sample_not_found", 404)
        return each.place, image

    async def score(place: str, document: Input | SampleImage) -> float | None:
        async with turns:
            try:
                pair = [await loaded(each) for each in (query, document)]
                async with loader.pictures([each for each in pair if not isinstance(each, str)], caller) as pictures:
                    return normalised(await vlms.score(judged(pair, pictures), CHOICES, snapshot, deadline))[0]
            except InvalidRequest as error:
                raise field_error(place, str(error), error.code) from None
            except ApiError as error:
                if isinstance(document, SampleImage) and error.status_code in (400, 404, 413):
                    return None
                raise

    return await gathered(score(place, each) for place, each in zip(places, documents, strict=True))


def judged(pair: Sequence[Input], pictures: Sequence[Image]) -> GenerationRequest:
    if isinstance(pair[0], str) and pictures:
        return question(pictures[0], ABOUT_IMAGE.format(pair[0]))
    number = iter(range(len(pictures)))
    query, document = (each if isinstance(each, str) else next(number) for each in pair)
    content = (INSTRUCT, query, "\n<Document>:", document)
    return GenerationRequest((Message("system", (JUDGE,)), Message("user", content)), tuple(pictures))
