"""Embeddings by the Open Inference Protocol (KServe's v2, REST with JSON data), for platforms and benchmarks that speak
it: inputs ``text`` and ``image`` (BYTES), output ``embedding`` (FP32). Not for everything else: the binary extension,
gRPC and the VLM have no place here."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse
from pydantic import FailFast, Field

from core import metrics
from serving.http import health
from serving.http.app_state import app_state
from serving.http.bodies import OpenAIBody, ResponseBody, json_body, json_response, json_schema
from serving.http.embeddings import MAX_INPUTS, Input, embed
from serving.http.request_bodies import caller_of

router = APIRouter(tags=["Open Inference Protocol"])
ModelName = Annotated[str, PathParameter(json_schema_extra={"format": "model"})]
Kind = Literal["text", "image"]


class InferInput(OpenAIBody):
    """Texts, or images in base64, as data URIs or URLs."""

    name: Kind
    datatype: Literal["BYTES"] = "BYTES"
    shape: list[int] = Field(description="[n], or [n, 1]; the data tells n.")
    data: Annotated[list[str], FailFast()] = Field(min_length=1, max_length=MAX_INPUTS, description="Flat.")


class InferRequest(OpenAIBody):
    """One tensor of texts or of images. Requested outputs and parameters are ignored."""

    id: str | None = Field(None, max_length=200)
    inputs: list[InferInput] = Field(min_length=1, max_length=1)


class OutputTensor(ResponseBody):
    """Vectors, row after row."""

    name: Literal["embedding"]
    datatype: Literal["FP32"]
    shape: list[int]
    data: list[float | None]


class InferResponse(ResponseBody):
    """Vectors of unit length, in the order of the input."""

    model_name: str
    model_version: str
    """The number of the release."""
    id: str | None = None
    outputs: list[OutputTensor]


router.get("/v2/health/live", include_in_schema=False)(health.live)
router.get("/v2/health/ready", include_in_schema=False)(health.ready)


@router.get("/v2", include_in_schema=False)
async def server_metadata() -> JSONResponse:
    return JSONResponse({"name": "ratchet", "version": metrics.build.number(), "extensions": []})


@router.get("/v2/models/{model}", include_in_schema=False)
async def model_metadata(request: Request, model: str) -> JSONResponse:
    state = app_state(request)
    snapshot = state.admission.resolve(model)
    inputs = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in get_args(Kind)]
    outputs = [{"name": "embedding", "datatype": "FP32", "shape": [-1, state.dim]}]
    known = {"name": model, "versions": [str(snapshot.release)], "platform": "ratchet"}
    return JSONResponse({**known, "inputs": inputs, "outputs": outputs})


@router.get("/v2/models/{model}/ready", include_in_schema=False)
async def model_ready(request: Request, model: str) -> JSONResponse:
    app_state(request).admission.resolve(model)
    return JSONResponse({"name": model, "ready": True})


@router.post(
    "/v2/models/{model}/infer", summary="Embed, by the Open Inference Protocol", response_model=InferResponse,
    openapi_extra=json_schema(InferRequest),
)  # fmt: skip
async def infer(request: Request, model: ModelName) -> Response:
    """Vectors of texts or images, as `/v1/embeddings` gives them."""
    state = app_state(request)
    body = await json_body(request, InferRequest)
    (sent,) = body.inputs
    async with state.answering(request, model) as (snapshot, deadline):
        embedded = await embed(state, snapshot, _inputs(sent), deadline, caller_of(request.scope))
        rows = embedded.rows
        output = {"name": "embedding", "datatype": "FP32", "shape": rows.shape, "data": rows.ravel()}
        named = {"model_name": model, "model_version": str(snapshot.release), "id": body.id}
        answer = {name: value for name, value in named.items() if value is not None} | {"outputs": [output]}
        return json_response(answer, state.headers(request, "embeddings", snapshot) | embedded.headers)


def _inputs(sent: InferInput) -> list[Input]:
    if sent.name == "text":
        return [*sent.data]
    return [
        (f"inputs.0.data.{index}", item if item[:5].lower() in ("data:", "http:", "https") else f"data:;base64,{item}")
        for index, item in enumerate(sent.data)
    ]
