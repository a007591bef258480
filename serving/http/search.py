"""POST /v1/search and the images of samples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pybase64
from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import ConfigDict, FailFast, Field, field_validator

from core.digests import digest_bytes
from serving.catalog.queries import MAX_DEPTH, Found, Hit, Search, as_filters
from serving.engines.calibration import Kind, MatchCurve
from serving.http.app_state import AppState, app_state
from serving.http.bodies import (
    MODEL,
    SPACE,
    TRUNCATE,
    Body,
    Name,
    Picture,
    ResponseBody,
    SampleId,
    Source,
    body_schemas,
    in_range,
    json_response,
    read_body,
)
from serving.http.calibrations import MIN_PROBABILITY, with_probabilities
from serving.http.embeddings import Input, VectorBody, embed, encoded
from serving.http.errors import ApiError, ErrorBody, field_error
from serving.http.request_bodies import caller_of
from serving.http.rerank import RERANK, reranked
from serving.releases.types import ReleaseSnapshot

router = APIRouter(tags=["Search"])
LISTS = {"domain", "source", "concepts", "labels", "tags"}
MAX_VECTORS = 1000
CURSOR = re.compile("([0-9]{1,4})-([0-9A-Za-z]{1,64})-([0-9a-f]{12})")
"""Hits before the page, image space, and digest of the request."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
PNG: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image, at most `size` pixels wide and high.",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    },
    404: {"model": ErrorBody, "description": "`sample_not_found`: there is no such sample, or it was deleted."},
    410: {"model": ErrorBody, "description": "The stored image cannot be read."},
}
SAMPLE_ID = re.compile("[0-9a-f]{64}")


class SearchQuery(Body):
    """What to search for: one of the fields."""

    text: str | None = Field(None, min_length=1, description="A text.")
    image: Picture | None = Field(None, description="An image: a data URI, or a URL where the server fetches them.")
    vector: Annotated[list[Number], FailFast()] = Field(
        [], description="A vector of the image space that `space` names, of any length: numbers, or base64 of "
        "little-endian float32.",
    )  # fmt: skip
    id: SampleId | None = Field(None, description="A sample, by its own vector. It is not among the hits.")

    @field_validator("vector", mode="before", json_schema_input_type=list[Number] | str)
    @classmethod
    def decoded(cls, value: Any) -> Any:
        is_text = isinstance(value, str)
        return np.frombuffer(pybase64.b64decode(value, validate=True), "<f4").tolist() if is_text else value

    @property
    def given(self) -> list[str]:
        return [name for name in SearchQuery.model_fields if getattr(self, name)]

    @property
    def kind(self) -> Kind | None:
        """How its similarities are calibrated; None for a vector, which may be of a text or of an image."""
        return "text" if self.text is not None else None if self.vector else "image"


class SearchRequest(SearchQuery):
    """Find accepted samples by a text, an image, a vector, a sample, or several of these in `queries`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "a red dragon", "k": 5, "domain": ["pixel_ultica"]}]}
    )
    queries: Annotated[list[SearchQuery], FailFast()] = Field(
        [], max_length=32, description="Several queries, which one release answers in their order."
    )
    k: int = Field(10, ge=1, le=100, description="Maximum number of hits of a query.")
    domain: Annotated[list[Name], FailFast()] = Field([], max_length=50, description="Filter by domain.")
    source: Annotated[list[Source], FailFast()] = Field([], max_length=50, description="Filter by source.")
    concepts: Annotated[list[Name], FailFast()] = Field([], max_length=50, description="Filter by concept.")
    labels: Annotated[list[Name], FailFast()] = Field([], max_length=50, description="Filter by label.")
    tags: Annotated[list[Name], FailFast()] = Field([], max_length=50, description="Only samples with one of the tags.")
    since: datetime | None = Field(None, description="Earliest sample time (UTC), inclusive.")
    until: datetime | None = Field(None, description="Latest sample time (UTC), exclusive.")
    min_probability: float | None = MIN_PROBABILITY
    rerank: int = RERANK
    cursor: str | None = Field(None, max_length=200, description="For another page: `next` of the page before it.")
    vectors: bool = Field(False, description=f"Return vectors of hits, for at most {MAX_VECTORS} (`k` times queries).")
    encoding_format: Literal["float", "base64"] = Field("float", description="Of the vectors of hits.")
    truncate: bool = TRUNCATE
    space: str | None = SPACE
    model: str = MODEL

    _in_range = field_validator("since", "until")(in_range)

    @property
    def places(self) -> dict[str, SearchQuery]:
        """Each query, by the beginning of its fields' names."""
        return {f"queries.{at}.": each for at, each in enumerate(self.queries)} or {"": self}


class SearchHit(ResponseBody):
    """A sample that was found."""

    id: str
    """SHA-256 of its content, 64 hex digits."""
    score: float | None
    """Cosine similarity, from -1 to 1."""
    probability: float | None
    """Of a match, by the release's calibration; null without one."""
    relevance_score: float | None = None
    """With `rerank`: the VLM's probability that it matches; left out for hits that it did not see."""
    text: str
    domain: str
    source: str
    time: datetime | None
    """Of the sample, UTC."""
    vector: VectorBody | None = None
    """With `vectors`: of unit length. null: the sample is not embedded in this space yet."""


class QueryHits(ResponseBody):
    """Hits of one of several queries, the nearest first."""

    data: list[SearchHit]


class SearchResults(ResponseBody):
    """Hits, the nearest first."""

    object: Literal["list"]
    model: str
    """`clip@` and the number of the release."""
    space: str
    """Digest of the image embedding space that was searched."""
    data: list[SearchHit] = Field(default=[])
    """Left out with `queries`."""
    results: list[QueryHits] = Field(default=[])
    """With `queries`, in their order."""
    next: str | None
    """`cursor` of the next page; null after the last one."""


@router.post(
    "/v1/search",
    summary="Find samples",
    response_model=SearchResults,
    openapi_extra=body_schemas(SearchRequest, "image"),
)
async def search(request: Request) -> Response:
    """The accepted samples nearest to a text, an image, a vector or a sample. Queries and index are of one release's
    embedding space.

    The image may come as a file of a form, or be the body, with the other fields in the query.
    """
    state = app_state(request)
    body, uploads = await read_body(request, SearchRequest, "image", LISTS, max_files=1)
    check_queries(body, state)
    filters = as_filters(body.domain, body.source, body.since, body.until, body.concepts, body.labels, body.tags)
    asked = digest_bytes(body.model_dump_json(exclude={"cursor"}).encode(), *uploads)[:12]
    offset, space = offset_of(body, asked)
    async with state.answering(request, body.model, space=space or body.space) as (snapshot, deadline):
        kinds = [query.kind for query in body.places.values()]
        curves = [kind and await state.calibrations.curve(kind, snapshot, body.min_probability) for kind in kinds]
        queries, headers = await queries_of(body, uploads, state, snapshot, deadline, caller_of(request.scope))
        wanted = Search(queries, body.k, filters, offset, body.vectors)
        found = await state.index.search(snapshot.image_space, wanted)
        for sample in found.missing:
            place = next(place for place, query in body.places.items() if query.id == sample)
            problem = (
                f"no sample {sample} has a vector in image space {snapshot.image_space}: it was deleted, or waits."
            )
            raise field_error(f"{place}id", problem, "sample_not_found", 404)
        lists = [_rows(hits, curve, found, body) for hits, curve in zip(found.hits, curves, strict=True)]
        if body.rerank:
            query = body.text if body.text is not None else ("image", uploads[0] if uploads else str(body.image))
            lists = [await reranked(request, snapshot, query, lists[0], body.rerank, deadline)]
        more = offset + body.k < MAX_DEPTH and any(len(hits) == body.k for hits in found.hits)
        answer = {
            "object": "list", "model": f"clip@{snapshot.release}", "space": snapshot.image_space,
            **({"results": [{"data": rows} for rows in lists]} if body.queries else {"data": lists[0]}),
            "next": f"{offset + body.k}-{snapshot.image_space}-{asked}" if more else None,
        }  # fmt: skip
        ids = [row["id"] for rows in lists for row in rows]
        return json_response(answer, state.headers(request, "search", snapshot, shown=ids) | headers)


def check_queries(body: SearchRequest, state: AppState) -> None:
    """Refuse (ApiError) queries that are not of one kind, and vectors that are not of a space."""
    if body.queries and body.given:
        raise field_error(body.given[0], "give either one query, or several in `queries`.", "invalid_value")
    if body.vectors and body.k * len(body.places) > MAX_VECTORS:
        problem = f"an answer has at most {MAX_VECTORS}. Lower `k`, or send fewer queries at once."
        raise field_error("vectors", problem, "too_many_vectors")
    if body.rerank and body.text is None and body.image is None:
        problem = "the VLM compares a text or an image with hits: leave it out for other queries."
        raise field_error("rerank", problem, "invalid_value")
    for place, query in body.places.items():
        if len(query.given) != 1:
            problem = "give either a text, an image, a vector or an id to search for."
            raise field_error(f"{place}text", problem, "invalid_value")
        if query.text is not None:
            state.check_length(f"{place}text", query.text)
        if not query.vector:
            continue
        if body.min_probability is not None:
            problem = "a vector may be of a text or of an image, whose similarities differ. Compare scores."
            raise field_error("min_probability", problem, "not_calibrated")
        if len(query.vector) != state.dim or not any(query.vector):
            problem = f"a vector has {state.dim} numbers here, and not all are zero."
            raise field_error(f"{place}vector", problem, "invalid_value")
        if body.space is None:
            problem = "name the image space that the vector is of: vectors of another one would find other samples."
            raise field_error("space", f"{problem} The answer that it came from names it.", "space_missing")


def offset_of(body: SearchRequest, asked: str) -> tuple[int, str | None]:
    """Hits of the pages before, and their image space. ``asked``: digest of the request. Raises ApiError for another
    one's cursor."""
    if body.cursor is None:
        return 0, None
    match = CURSOR.fullmatch(body.cursor)
    if match is None or match[3] != asked or int(match[1]) not in range(body.k, MAX_DEPTH, body.k):
        problem = "this is not the `next` of the same request. For each page, change only the cursor."
        raise field_error("cursor", problem, "invalid_cursor")
    return int(match[1]), match[2]


async def queries_of(
    body: SearchRequest, uploads: list[bytes], state: AppState, snapshot: ReleaseSnapshot, deadline: float, caller: str
) -> tuple[list[npt.NDArray[np.float32] | str], dict[str, str]]:
    """Queries for the catalog, and headers. Texts and images are embedded together. Raises as
    :func:`serving.http.embeddings.embed`."""
    inputs: dict[str, Input] = {}
    for place, query in body.places.items():
        if query.text is not None:
            inputs[f"{place}text"] = query.text
        elif query.image is not None:
            inputs[f"{place}image"] = (f"{place}image", uploads[0] if uploads else query.image)
    names, rows, headers = list(inputs), iter(()), {}
    if inputs:
        embedded = await embed(
            state, snapshot, list(inputs.values()), deadline, caller, body.truncate, names.__getitem__
        )
        rows, headers = iter(embedded.rows), embedded.headers
    queries = [each.id or (_unit(each.vector) if each.vector else next(rows)) for each in body.places.values()]
    return queries, headers


def _unit(vector: list[float]) -> npt.NDArray[np.float32]:
    scaled = np.asarray(vector) / np.abs(vector).max()  # the square of a number may be too large, or zero
    return np.asarray(scaled / np.linalg.norm(scaled), np.float32)


def _rows(hits: Sequence[Hit], curve: MatchCurve | None, found: Found, body: SearchRequest) -> list[dict[str, Any]]:
    rows = [asdict(hit) for hit in with_probabilities(hits, curve, body.min_probability)]
    for row in rows if body.vectors else ():
        vector = found.vectors.get(row["id"])
        row["vector"] = None if vector is None else encoded(vector, body.encoding_format)
    return rows


@router.get(
    "/v1/samples/{sample_id}/image",
    summary="A sample's image as PNG",
    response_model=None,
    response_class=Response,
    responses=PNG,
)
async def sample_image(
    request: Request,
    sample_id: Annotated[
        str, PathParameter(description="64 hex digits, from a hit.", json_schema_extra={"format": "sample"})
    ],
    size: Annotated[int, Query(ge=16, le=1024, description="Longest side, pixels.")] = 256,
) -> Response:
    """Re-encoded, so that no byte from a producer reaches a browser."""
    state = app_state(request)
    data = await state.index.image(sample_id) if SAMPLE_ID.fullmatch(sample_id) else None
    if data is None:
        raise ApiError(404, f"there is no sample {sample_id[:80]!r}.", param="sample_id", code="sample_not_found")
    try:
        png = await state.image_loader.thumbnail(data, size, caller_of(request.scope))
    except ApiError as error:
        if error.status_code == 429:
            raise
        raise ApiError(410, f"the image cannot be shown: {error.detail}", code=error.code) from None
    # A cache would keep showing deleted images.
    return Response(png, media_type="image/png", headers={"Cache-Control": "private, no-store"})
