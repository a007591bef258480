"""POST /v1/embeddings and GET /v1/models, as in the OpenAI API; inputs may be images too."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse

from ops.ledger.rows import Family
from serving.http.app_state import CLIP, VLM, AppState, app_state, json_body, json_schema, stamp_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.errors import ApiError
from serving.http.schemas import EmbeddingsRequest, ImageItem, ImageUrlItem, Item, TextItem
from serving.messages import EncodeResult
from serving.releases.release_snapshot import ReleaseSnapshot

router = APIRouter(tags=["OpenAI compatible"])


@router.post("/v1/embeddings", summary="Embed texts and images", openapi_extra=json_schema(EmbeddingsRequest))
async def embeddings(request: Request) -> JSONResponse:
    """Vectors of unit length, in the order of the inputs. All are made by the release in `x-ratchet-release`.

    An image is `{"image": "data:image/png;base64,..."}`, or a URL where the server fetches them.
    Compare vectors of one release by dot product.
    """
    at = app_state(request)
    asked = await json_body(request, EmbeddingsRequest)
    if asked.dimensions is not None and asked.dimensions != at.dim:
        raise ApiError(
            400, f"dimensions: this model has {at.dim} dimensions and cannot be cut.", param="dimensions",
            code="unsupported_dimensions",
        )  # fmt: skip
    deadline = at.deadline()
    with at.admit(request, asked.model, user=asked.user) as stamp:
        async with cancel_on_disconnect(request.receive, deadline):
            vectors, tokens = await embed(at, stamp, asked.items(), "input", deadline)
        data = [
            {"object": "embedding", "index": index, "embedding": encoded(row, asked.encoding_format)}
            for index, row in enumerate(vectors)
        ]
        return JSONResponse(
            {
                "object": "list", "data": data, "model": f"clip@{stamp.release}",
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
            headers=stamp_headers(stamp),
        )  # fmt: skip


async def embed(
    at: AppState, stamp: ReleaseSnapshot, items: list[Item], param: str, deadline: float
) -> tuple[npt.NDArray[np.float32], int]:
    """Vectors [n, dim] of mixed items, and the texts' tokens."""
    texts: dict[int, str] = {}
    images: dict[int, tuple[str, str]] = {}
    for index, item in enumerate(items):
        if isinstance(item, str):
            texts[index] = item
        elif isinstance(item, TextItem):
            texts[index] = item.text
        elif isinstance(item, ImageUrlItem):
            images[index] = (f"{param}.{index}.image_url", item.image_url.url)
        elif isinstance(item, ImageItem):
            images[index] = (f"{param}.{index}.image", item.image)
    at.check_texts(list(texts.values()), param)
    vectors = np.zeros((len(items), at.dim), np.float32)
    tokens = 0
    if images:
        pixels = await at.image_loader.pixels(list(images.values()))
        vectors[list(images)] = made(await at.encoders.encode("image", pixels, stamp, deadline))
    if texts:
        answer = await at.encoders.encode("text", list(texts.values()), stamp, deadline)
        vectors[list(texts)] = made(answer)
        tokens = answer.tokens
    return vectors, tokens


def made(answer: EncodeResult) -> npt.NDArray[np.float32]:
    """The vectors of an answer that succeeded."""
    if answer.vectors is None:
        raise ApiError(500, answer.error or "the encoder gave no vectors.", code="internal")
    return answer.vectors


def encoded(row: npt.NDArray[np.float32], how: str) -> Any:
    """One vector as JSON carries it."""
    return base64.b64encode(row.astype("<f4").tobytes()).decode() if how == "base64" else row.tolist()


@router.get("/v1/models", summary="Models that requests may name")
async def models(request: Request) -> JSONResponse:
    """`clip` and `vlm` are what is live; the others are resident now and stay addressable while in the window."""
    at = app_state(request)
    rows = [described(at, name, CLIP) for name in at.admission.names(CLIP)]
    if at.vlms is not None:
        taken = {row["id"] for row in rows}
        rows += [described(at, name, VLM) for name in at.admission.names(VLM) if name not in taken]
    return JSONResponse({"object": "list", "data": rows})


@router.get("/v1/models/{model}", summary="One model")
async def model(
    request: Request, model: Annotated[str, PathParameter(json_schema_extra={"format": "model"})]
) -> JSONResponse:
    """The release and, for a CLIP, the embedding spaces behind a name."""
    at = app_state(request)
    known = at.vlms is not None and model in at.admission.names(VLM) and model not in at.admission.names(CLIP)
    return JSONResponse(described(at, model, VLM if known else CLIP))


def described(at: AppState, name: str, family: Family) -> dict[str, Any]:
    """OpenAI's model object, with the release behind it."""
    stamp = at.admission.resolve(name, family)
    found = {
        "id": name, "object": "model", "created": 0, "owned_by": "ratchet", "family": family, "release": stamp.release,
    }  # fmt: skip
    if family == VLM:
        return {**found, "adapter": stamp.vlm_adapter}
    return {
        **found, "adapter": stamp.adapter, "image_space": stamp.image_space, "text_space": stamp.text_space,
        "dimensions": at.dim,
    }  # fmt: skip
