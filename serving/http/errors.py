"""Errors as HTTP answers: one shape for all, that of the OpenAI API.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
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
"""Of a key that a client made up, in an error that names it."""

TYPES = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
         405: "invalid_request_error", 408: "invalid_request_error", 409: "conflict_error",
         413: "invalid_request_error", 415: "invalid_request_error", 429: "rate_limit_error",
         503: "service_unavailable", 504: "timeout_error"}  # fmt: skip

CODES = {404: "not_found", 405: "method_not_allowed"}
"""Of errors that come from below us: a route that is not there, a broken multipart body."""

KNOWN: dict[type[RatchetError], tuple[int, str]] = {
    ReleaseConflict: (409, "release_conflict"),
    ReleaseError: (422, "release_failed"),
    AlreadyResubmitted: (409, "already_resubmitted"),
    LedgerUnavailable: (503, "ledger_unavailable"),
    LedgerError: (409, "ledger"),
    UnknownRecord: (404, "record_not_found"),
    BrokerError: (503, "broker"),
    StoreError: (503, "store"),
}
"""Of failures that are not of :mod:`serving.errors`, which know their own."""
PARAMS: dict[type[RatchetError], str] = {UnknownRecord: "place"}
"""The field that is wrong, where the kind of failure tells."""


class ErrorDetail(BaseModel):
    """What went wrong, where, and its stable code."""

    model_config = ConfigDict(extra="forbid")
    message: str = Field(min_length=1, description="What happened, and what to do.")
    type: str = Field(description="Kind of error, as OpenAI names it: `invalid_request_error`, `rate_limit_error`, ...")
    param: str | None = Field(description="The field that is wrong, as a path: `messages.0.content.1`.")
    code: str = Field(min_length=1, description="Stable name of the error, for programs.")


class ErrorBody(BaseModel):
    """The error object, of OpenAI's shape."""

    model_config = ConfigDict(extra="forbid")
    error: ErrorDetail


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused; `param` names the place."},
    408: {"model": ErrorBody, "description": "The body came too slowly."},
    429: {"model": ErrorBody, "description": "The queue, or your share of it, is full: come back after `Retry-After`."},
    503: {"model": ErrorBody, "description": "Starting, no replica answered, or no room for bodies: try again."},
    504: {"model": ErrorBody, "description": "The deadline passed before the answer was ready."},
}
"""What every route may answer besides its result. There is no 500 that is meant."""


def missing(description: str) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route that answers 404 for something that is not there."""
    return {404: {"model": ErrorBody, "description": description}}


class ApiError(HTTPException):
    """A refusal with its place (``param``) and a stable ``code``."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, headers)
        self.param = param
        self.code = code


def body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def answer(
    status: int, message: str, param: str | None = None, code: str | None = None,
    headers: dict[str, str] | None = None, retry_after: int = RETRY_AFTER_SECONDS,
) -> JSONResponse:  # fmt: skip
    """The error as a response; 429 and 503 tell when to come back."""
    metrics.http.refused(code or "other")
    extra = dict(headers or {})
    if status in (429, 503):
        extra.setdefault("Retry-After", str(retry_after))
    return JSONResponse(body(status, message, param, code), status, extra)


def from_validation(error: ValidationError, prefix: str = "") -> ApiError:
    """The first thing that is wrong with a body, in words, with its place."""
    first = error.errors(include_url=False, include_input=False)[0]
    parts = (str(part)[:SHOWN_CHARS] for part in first["loc"])  # a key of the client's may have megabytes
    place = ".".join(part for part in parts if not part.startswith("<"))  # but for the tags of a union
    param = ".".join(part for part in (prefix, place) if part) or first.get("ctx", {}).get("param")
    code = "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
    return ApiError(400, f"{param + ': ' if param else ''}{first['msg']}", param=param, code=code)


def from_record(error: RecordError, param: str) -> ApiError:
    """An image that was refused. What records call ``uri_...`` clients know as ``image_url_...``."""
    status = 413 if error.reason in ("image_too_large", "image_too_many_pixels") else 400
    code = error.reason.replace("uri_", "image_url_", 1) if error.reason.startswith("uri_") else error.reason
    return ApiError(status, f"{param}: {error}", param=param, code=code)


@dataclass(frozen=True, slots=True)
class Described:
    """What a client is told about a failure."""

    status: int
    message: str
    param: str | None
    code: str | None

    @property
    def content(self) -> dict[str, Any]:
        """The error object."""
        return body(self.status, self.message, self.param, self.code)


def described(error: Exception) -> Described:
    """Any failure as status and error object. What nobody foresaw is not shown to clients."""
    if isinstance(error, ApiError):
        return Described(error.status_code, str(error.detail), error.param, error.code)
    if isinstance(error, ServingError):
        return Described(error.status, str(error), error.param, error.code)
    if isinstance(error, RatchetError):
        for kind in type(error).__mro__:
            if kind in KNOWN:
                status, code = KNOWN[kind]
                return Described(status, str(error), PARAMS.get(kind), code)
        return Described(500, str(error), None, "internal")
    return Described(500, f"the server made a mistake; its log says which{_in_the_log()}.", None, "internal")


def _in_the_log() -> str:
    request = current()
    return f" (request {request.request_id})" if request is not None and request.request_id else ""


def is_fault(error: Exception) -> bool:
    """Whether a failure counts against the release that was to answer. Load, deadlines and replicas that come and go
    do not: they would fail any release.
    """
    if isinstance(error, AdapterUnservable):
        return True
    return described(error).status == 500


def install(app: FastAPI) -> None:
    """Let every failure of the app, expected or not, answer with the error object."""

    @app.exception_handler(HTTPException)
    async def on_http(_: Request, error: HTTPException) -> JSONResponse:
        param = getattr(error, "param", None)
        code = getattr(error, "code", None) or CODES.get(error.status_code, "invalid_request")
        return answer(error.status_code, str(error.detail), param, code, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def on_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        param = ".".join(str(part)[:SHOWN_CHARS] for part in first["loc"][1:])  # without "query" or "path"
        return answer(400, f"{param}: {first['msg']}", param, "invalid_value")

    @app.exception_handler(RatchetError)
    async def on_known(_: Request, error: RatchetError) -> JSONResponse:
        description = described(error)
        if description.code == "internal":
            log.error("unexpected %s: %s", type(error).__name__, error)
        seconds = error.retry_after if isinstance(error, ServingError) else RETRY_AFTER_SECONDS
        return answer(description.status, description.message, description.param, description.code, retry_after=seconds)

    @app.exception_handler(Exception)
    async def on_unknown(_: Request, error: Exception) -> JSONResponse:
        log.exception("unexpected error", exc_info=error)
        description = described(error)
        return answer(description.status, description.message, description.param, description.code)
