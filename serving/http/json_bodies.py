"""JSON in and out.

A data URI of 115 KB is read and checked in 32 microseconds by pydantic's own parser, in 65 by way of orjson.
512 float32 are written in 16 microseconds by orjson, which takes arrays of numpy as they are, in 310 by the standard
library.
"""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from pydantic import BaseModel, ValidationError, model_validator

from serving.http.errors import ApiError, from_validation

Model = TypeVar("Model", bound=BaseModel)
MAX_MARKS = 40_000
"""Commas and opening brackets outside of texts in one body. The longest list of inputs has 8192 items, and an image as
OpenAI writes it (``{"type": ..., "image_url": {"url": ...}}``) takes four.
A body of 16 MiB may hold eight million."""
MARKS = (b",", b"[", b"{")


def media_type(request: Request) -> str:
    """The body's content type in lower case, without its parameters; JSON where none is given."""
    return request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()


async def json_body(request: Request, model: type[Model]) -> Model:
    """The request's JSON, checked. Raises ApiError naming the first thing that is wrong."""
    kind = media_type(request)
    if kind != "application/json" and not kind.endswith("+json"):
        raise ApiError(415, f"content type {kind[:80]!r} is not taken here; send application/json.", code="media_type")
    data = await request.body()
    check_marks(data)
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise from_validation(error) from None


def check_marks(data: bytes) -> None:
    """Refuse JSON of more than :data:`MAX_MARKS` values before it is parsed. Raises ApiError.

    What is no JSON may pass: the parser stops at the first byte that is wrong.
    """
    if not _has_too_many(data):
        return
    strings = 2 * MAX_MARKS + 1  # one after each mark and one after its colon: valid JSON with more has more marks
    if b"\\" in data:
        data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    parts = data.split(b'"', 2 * strings)
    if len(parts) > 2 * strings or _has_too_many(b"".join(parts[::2])):
        raise ApiError(400, f"the body has more than {MAX_MARKS} values.", code="too_many_values")


def _has_too_many(data: bytes) -> bool:
    """Stops where there are more: to count eight million takes a tenth of a second, in which nobody else is served."""
    found = 0
    for start in range(0, len(data), MAX_MARKS):
        found += sum(data.count(mark, start, start + MAX_MARKS) for mark in MARKS)
        if found > MAX_MARKS:
            return True
    return False


def checked(model: type[Model], fields: Any) -> Model:
    """Fields as a model. Raises ApiError naming the first thing that is wrong."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None


def json_response(content: Any, headers: dict[str, str] | None = None, status: int = 200) -> Response:
    """An answer in JSON. A float32 has as many digits as tell it from its neighbours; NaN and infinity become null."""
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(data, status, headers, "application/json")


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` for a route that reads its body itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inline(model)}}}}


def inline(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema without references."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def resolve(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return resolve(definitions[value["$ref"].rsplit("/", 1)[-1]])
            return {key: resolve(child) for key, child in value.items()}
        return [resolve(child) for child in value] if isinstance(value, list) else value

    resolved: dict[str, Any] = resolve(schema)
    return resolved


class OpenAIBody(BaseModel):
    """An object in which null means the default, for fields that this server does not know too.

    OpenAI's API says so of each optional field, and clients rely on it: LiteLLM sends ``"encoding_format": null``.
    """

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, value: Any) -> Any:
        """The object without its nulls."""
        return {name: each for name, each in value.items() if each is not None} if isinstance(value, dict) else value


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, an empty text, list or object, or an object of such nulls."""
    if isinstance(value, dict):
        return all(each is None for each in value.values())
    return value is None or value in ("", [])
