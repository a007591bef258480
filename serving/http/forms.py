"""Multipart bodies of /v1/classify and /v1/search: files beside the fields of the JSON form."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from serving.http.app_state import Model, inline
from serving.http.errors import ApiError, from_validation

MAX_FIELDS = 1000


def is_form(request: Request) -> bool:
    """Whether the body is multipart."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_form(request: Request, max_files: int, many: set[str]) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Fields and files (field name, bytes) of a form. Fields in ``many`` are lists: repeated, or one JSON list.

    Raises:
        ApiError: the form is broken or has too many parts.
    """
    fields: dict[str, Any] = {}
    files: list[tuple[str, bytes]] = []
    async with request.form(max_files=max_files, max_fields=MAX_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append((name, await value.read()))
            elif name in many:
                fields.setdefault(name, []).extend(_listed(value))
            else:
                fields[name] = value
    return fields, files


def _listed(value: str) -> list[str]:
    if value.startswith("["):
        try:
            parts = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            return parts
    return [value]


def checked(model: type[Model], fields: dict[str, Any]) -> Model:
    """The fields as the JSON form's model. Raises ApiError."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise from_validation(error) from None


def both_schemas(model: type[BaseModel], file_field: str) -> dict[str, Any]:
    """``openapi_extra`` of a route that takes JSON or multipart."""
    schema = inline(model)
    file = {"type": "string", "format": "binary"}
    many = schema["properties"][file_field].get("type") == "array"
    properties = {**schema["properties"], file_field: {"type": "array", "items": file, "minItems": 1} if many else file}
    form = {key: value for key, value in schema.items() if key != "examples"} | {"properties": properties}
    return {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}},
        }
    }


def only(files: list[tuple[str, bytes]], field: str) -> list[bytes]:
    """The files, all of which must be in one field."""
    for name, _ in files:
        if name.removesuffix("[]") not in (field, field.removesuffix("s")):
            raise ApiError(
                400, f"{name[:80]}: files go into the field {field!r}.", param=name[:80], code="unknown_field"
            )
    return [data for _, data in files]
