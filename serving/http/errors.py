"""Errors as HTTP answers, all as in the OpenAI API: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException

from core import metrics
from core.errors import (
    AlreadyResubmitted,
    BrokerError,
    LedgerError,
    LedgerUnavailable,
    RatchetError,
    RecordError,
    ReleaseConflict,
    ReleaseError,
    StoreError,
    UnknownRecord,
)
from core.request_context import current
from serving.errors import AdapterUnservable, ServingError

log = logging.getLogger("ratchet.http")
RETRY_AFTER_SECONDS = 1
SHOWN_CHARS = 80
"""Of a client's key in an error that names it."""

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: "invalid_request_error", 408: "invalid_request_error", 409: "conflict_error",
         413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
         503: "service_unavailable", 504: "timeout_error"}  # fmt: skip

CODES = {404: "not_found", 405: "method_not_allowed"}
"""For errors of Starlette: an unknown route, a broken multipart body."""

KNOWN: dict[type[RatchetError], tuple[int, str, str | None]] = {
    ReleaseConflict: (409, "release_conflict", None),
    ReleaseError: (422, "release_failed", None),
    AlreadyResubmitted: (409, "already_resubmitted", None),
    LedgerUnavailable: (503, "ledger_unavailable", None),
    LedgerError: (409, "ledger", None),
    UnknownRecord: (404, "record_not_found", "place"),
    BrokerError: (503, "broker", None),
    StoreError: (503, "store", None),
}
"""Status, code and wrong field of failures outside :mod:`serving.errors`, whose classes have their own."""


class ErrorDetail(BaseModel):
    """The problem, its place, and its stable code."""

    model_config = ConfigDict(extra="forbid")
    message: str = Field(min_length=1, description="Problem and fix.")
    type: str = Field(description="Kind of error, as OpenAI names it: `invalid_request_error`, `rate_limit_error`, ...")
    param: str | None = Field(description="The field that is wrong, as a path: `messages.0.content.1`.")
    code: str = Field(min_length=1, description="Stable name of the error, for programs.")


class ErrorBody(BaseModel):
    """The error object, of OpenAI's shape."""

    model_config = ConfigDict(extra="forbid")
    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is invalid; `param` names the field."},
    408: {"model": ErrorBody, "description": "The body arrived too slowly."},
    429: {"model": ErrorBody, "description": "The queue, or your share of it, is full: try again after `Retry-After`."},
    503: {
        "model": ErrorBody,
        "description": "The server is starting, no replica answered, or memory for bodies is full: try again.",
    },
    504: {"model": ErrorBody, "description": "The deadline passed before the answer was ready."},
}
"""Answers of every route other than its result. No 500 is intended."""


def missing(description: str) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that answers 404 for a missing object."""
    return {404: {"model": ErrorBody, "description": description}}


class ApiError(HTTPException):
    """A refused request, with the place of the problem (``param``) and a stable ``code``."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def field_error(param: str, problem: str, code: str, status: int = 400) -> ApiError:
    """The error of a field, named at the start of the message."""
    return ApiError(status, f"{param}: {problem}", param=param, code=code)


def from_validation(error: ValidationError) -> ApiError:
    """The first problem of a body and its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    parts = (str(part)[:SHOWN_CHARS] for part in first["loc"])  # keys of clients may have megabytes
    place = ".".join(part for part in parts if not part.startswith("<"))  # without the tags of a union
    param = place or first.get("ctx", {}).get("param")
    code = "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
    return ApiError(400, f"{param + ': ' if param else ''}{first['msg']}", param=param, code=code)


def from_record(error: RecordError, param: str) -> ApiError:
    """The error of a refused image, with ``uri_...`` codes as ``image_url_...``."""
    status = 413 if error.reason in ("image_too_large", "image_too_many_pixels") else 400
    code = error.reason.replace("uri_", "image_url_", 1) if error.reason.startswith("uri_") else error.reason
    return field_error(param, str(error), code, status)


@dataclass(frozen=True, slots=True)
class Described:
    status: int
    message: str
    param: str | None
    code: str | None
    headers: Mapping[str, str] = field(default_factory=dict)
    """With ``Retry-After`` for 429 and 503."""

    @property
    def content(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def described(error: Exception) -> Described:
    """Any failure as status and error object. Details of unexpected ones are not shown to clients."""
    if isinstance(error, HTTPException):
        status, param = error.status_code, getattr(error, "param", None)
        code = getattr(error, "code", None) or CODES.get(status, "invalid_request")
        return Described(status, str(error.detail), param, code, _with_retry(status, error.headers))
    if isinstance(error, ServingError):
        headers = _with_retry(error.status, None, error.retry_after)
        return Described(error.status, str(error), error.param, error.code, headers)
    if isinstance(error, RatchetError):
        for kind in type(error).__mro__:
            if kind in KNOWN:
                status, code, param = KNOWN[kind]
                return Described(status, str(error), param, code, _with_retry(status))
        return Described(500, str(error), None, "internal")
    request = current()
    which = f" (request {request.request_id})" if request is not None and request.request_id else ""
    return Described(500, f"the server made a mistake; its log says which{which}.", None, "internal")


def _with_retry(
    status: int, headers: Mapping[str, str] | None = None, seconds: int = RETRY_AFTER_SECONDS
) -> dict[str, str]:
    return {**({"Retry-After": str(seconds)} if status in (429, 503) else {}), **(headers or {})}


def is_fault(error: Exception) -> bool:
    """True if a failure counts against the release that was to answer. Load, deadlines and replicas that come and go do
    not: they would fail any release."""
    return isinstance(error, AdapterUnservable) or described(error).status == 500


def told(error: Exception) -> Described:
    """:func:`described` for an answer to a client: counts the failure, and logs internal ones."""
    description = described(error)
    metrics.http.refused(description.code or "other")
    if description.code == "internal":
        log.error("unexpected error: %s", error, exc_info=error)
    return description


def answer(error: Exception) -> JSONResponse:
    description = told(error)
    return JSONResponse(description.content, description.status, description.headers)


def install(app: FastAPI) -> None:
    """Answer every failure of the app, expected or not, with the error object."""

    async def on_error(_: Request, error: Exception) -> JSONResponse:
        if isinstance(error, RequestValidationError):  # of a query or a path
            first = error.errors()[0]
            param = ".".join(str(part)[:SHOWN_CHARS] for part in first["loc"][1:])  # without "query" or "path"
            error = ApiError(400, f"{param}: {first['msg']}", param=param, code="invalid_value")
        return answer(error)

    for kind in (HTTPException, RequestValidationError, RatchetError, Exception):
        app.add_exception_handler(kind, on_error)
