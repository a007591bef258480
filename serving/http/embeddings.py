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
from serving.http.app_state import CLIP, VLM, AppState, app_state, json_body, json_schema, release_headers
from serving.http.cancel_on_disconnect import cancel_on_disconnect
from serving.http.errors import ApiError
from serving.http.request_bodies import caller_of
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
    state = app_state(request)
    body = await json_body(request, EmbeddingsRequest)
    if body.dimensions is not None and body.dimensions != state.dim:
        raise ApiError(
            400, f"dimensions: this model has {state.dim} dimensions and cannot be cut.", param="dimensions",
            code="unsupported_dimensions",
        )  # fmt: skip
    deadline = state.deadline()
    with state.admit(request, body.model, user=body.user) as snapshot:
        async with cancel_on_disconnect(request.receive, deadline):
            vectors, tokens = await embed(state, snapshot, body.items(), "input", deadline, caller_of(request))
        data = [
            {"object": "embedding", "index": index, "embedding": encoded(row, body.encoding_format)}
            for index, row in enumerate(vectors)
        ]
        return JSONResponse(
            {
                "object": "list", "data": data, "model": f"clip@{snapshot.release}",
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            },
            headers=release_headers(snapshot),
        )  # fmt: skip


async def embed(
    state: AppState, snapshot: ReleaseSnapshot, items: list[Item], param: str, deadline: float, caller: str
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
    state.check_texts(list(texts.values()), param)
    vectors = np.zeros((len(items), state.dim), np.float32)
    tokens = 0
    if images:
        pixels = await state.image_loader.pixels(list(images.values()), caller)
        vectors[list(images)] = vectors_of(await state.encoders.encode("image", pixels, snapshot, deadline))
    if texts:
        rows = await state.token_rows(list(texts.values()))
        answer = await state.encoders.encode("text", rows, snapshot, deadline)
        vectors[list(texts)] = vectors_of(answer)
        tokens = answer.tokens
    return vectors, tokens


def vectors_of(answer: EncodeResult) -> npt.NDArray[np.float32]:
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
    state = app_state(request)
    rows = [described(state, name, CLIP) for name in state.admission.names(CLIP)]
    if state.vlms is not None:
        taken = {row["id"] for row in rows}
        rows += [described(state, name, VLM) for name in state.admission.names(VLM) if name not in taken]
    return JSONResponse({"object": "list", "data": rows})


@router.get("/v1/models/{model}", summary="One model")
async def model(
    request: Request, model: Annotated[str, PathParameter(json_schema_extra={"format": "model"})]
) -> JSONResponse:
    """The release and, for a CLIP, the embedding spaces behind a name."""
    state = app_state(request)
    known = state.vlms is not None and model in state.admission.names(VLM) and model not in state.admission.names(CLIP)
    return JSONResponse(described(state, model, VLM if known else CLIP))


def described(state: AppState, name: str, family: Family) -> dict[str, Any]:
    """OpenAI's model object, with the release behind it."""
    snapshot = state.admission.resolve(name, family)
    model_object = {
        "id": name, "object": "model", "created": 0, "owned_by": "ratchet", "family": family,
        "release": snapshot.release,
    }  # fmt: skip
    if family == VLM:
        return {**model_object, "adapter": snapshot.vlm_adapter}
    return {
        **model_object, "adapter": snapshot.adapter,
        "image_space": snapshot.image_space, "text_space": snapshot.text_space,
        "dimensions": state.dim,
    }  # fmt: skip
