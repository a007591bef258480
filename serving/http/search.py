"""POST /v1/search and the images of samples."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import ConfigDict, FailFast, Field, field_validator

from serving.catalog.queries import as_filters
from serving.http.app_state import app_state
from serving.http.bodies import (
    MODEL,
    SPACE,
    TRUNCATE,
    Body,
    Name,
    Picture,
    ResponseBody,
    Source,
    body_schemas,
    in_range,
    json_response,
    read_body,
)
from serving.http.errors import ApiError, ErrorBody
from serving.http.request_bodies import caller_of
from serving.http.rerank import RERANK, reranked

router = APIRouter(tags=["Search"])
LISTS = {"domain", "source"}
PNG: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The image, at most `size` pixels wide and high.",
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}},
    },
    404: {"model": ErrorBody, "description": "`sample_not_found`: there is no such sample, or it was deleted."},
    410: {"model": ErrorBody, "description": "The stored image cannot be read."},
}
SAMPLE_ID = re.compile("[0-9a-f]{64}")


class SearchRequest(Body):
    """Find accepted samples by a text or by an image."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "a red dragon", "k": 5, "domain": ["pixel_ultica"]}]}
    )
    text: str | None = Field(None, min_length=1, description="Text to search for; or `image`.")
    image: Picture | None = Field(None, description="A data URI, or a URL; or `text`.")
    k: int = Field(10, ge=1, le=100, description="Maximum number of hits.")
    domain: Annotated[list[Name], FailFast()] = Field([], max_length=50, description="Filter by domain.")
    source: Annotated[list[Source], FailFast()] = Field([], max_length=50, description="Filter by source.")
    since: datetime | None = Field(None, description="Earliest sample time (UTC), inclusive.")
    until: datetime | None = Field(None, description="Latest sample time (UTC), exclusive.")
    rerank: int = RERANK
    truncate: bool = TRUNCATE
    space: str | None = SPACE
    model: str = MODEL

    _in_range = field_validator("since", "until")(in_range)


class SearchHit(ResponseBody):
    """A sample that was found."""

    id: str
    """SHA-256 of its content, 64 hex digits."""
    score: float | None
    """Cosine similarity, from -1 to 1."""
    relevance_score: float | None = None
    """With `rerank`: the VLM's probability that it matches; left out for hits that it did not see."""
    text: str
    domain: str
    source: str
    time: datetime | None
    """Of the sample, UTC."""


class SearchResults(ResponseBody):
    """Hits, the nearest first."""

    object: Literal["list"]
    model: str
    """`clip@` and the number of the release."""
    space: str
    """Digest of the image embedding space that was searched."""
    data: list[SearchHit]


@router.post(
    "/v1/search",
    summary="Find samples",
    response_model=SearchResults,
    openapi_extra=body_schemas(SearchRequest, "image"),
)
async def search(request: Request) -> Response:
    """The accepted samples nearest to a text or an image. Query and index are of one release's embedding space.

    The image may come as a file of a form, or be the body, with the other fields in the query.
    """
    state = app_state(request)
    body, uploads = await read_body(request, SearchRequest, "image", LISTS, max_files=1)
    if (body.text is None) == (body.image is None):
        raise ApiError(400, "give either a text or an image to search for.", param="text", code="invalid_value")
    filters = as_filters(body.domain, body.source, body.since, body.until)
    caller = caller_of(request.scope)
    async with state.answering(request, body.model, space=body.space) as (snapshot, deadline):
        if body.text is not None:
            state.check_texts([body.text], "text")
            whole = () if body.truncate else ("text",)
            vectors = await state.vectors.of_texts([body.text], snapshot, deadline, caller, whole)
        else:
            source: str | bytes = uploads[0] if uploads else str(body.image)
            vectors = await state.vectors.of_images([("image", source)], snapshot, deadline, caller)
        query = body.text if body.text is not None else ("image", source)
        hits = await state.index.search(snapshot.image_space, vectors.rows[0], body.k, filters)
        rows = await reranked(request, snapshot, query, hits, body.rerank, deadline)
        return json_response(
            {"object": "list", "model": f"clip@{snapshot.release}", "space": snapshot.image_space, "data": rows},
            state.headers(request, "search", snapshot, shown=[row["id"] for row in rows]) | vectors.headers,
        )


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
