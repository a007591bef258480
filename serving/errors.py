"""Failures of a request to the models, with the HTTP status and ``code`` that clients get. Free of Ray and HTTP.

    ServingError
      InvalidRequest             400  invalid_request
      UnknownModel               404  model_not_found
      SpaceGone                  409  space_gone
      QueueFull                  429  overloaded
      NotReady                   503  not_ready
      VlmStarting                503  vlm_starting
      Unavailable                503  unavailable
         AdapterUnservable
         WrongSpace
      EngineDead                 503  unavailable
      DeadlineExceeded           504  deadline_exceeded

:mod:`serving.http.errors` turns these, and failures of other parts, into answers.
"""

from __future__ import annotations

from typing import ClassVar

from core.errors import RatchetError


class ServingError(RatchetError):
    """A failure of a request."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    """Stable name of the failure, for clients."""
    param: str | None = None
    """The field of the request that is wrong, where one is known."""
    retry_after: ClassVar[int] = 1
    """Seconds, for the ``Retry-After`` header of 429 and 503."""


class InvalidRequest(ServingError):
    """A generation request that cannot be answered: too long, too many images, an unknown role. ``param`` names the
    field, where it is one."""

    status, code = 400, "invalid_request"

    def __init__(self, message: str, fix: str = "", param: str | None = None) -> None:
        super().__init__(message, fix)
        self.param = param


class UnknownModel(ServingError):
    """The ``model`` of a request is not resident."""

    status, code, param = 404, "model_not_found", "model"


class SpaceGone(ServingError):
    """No resident release has the embedding space that the request names."""

    status, code, param = 409, "space_gone", "space"


class QueueFull(ServingError):
    """The queue in front of the replicas is full."""

    status, code = 429, "overloaded"


class NotReady(ServingError):
    """No release is known yet."""

    status, code = 503, "not_ready"


class VlmStarting(ServingError):
    """No VLM replica has answered since this process started; loading a VLM takes a minute, without delaying CLIP."""

    status, code = 503, "vlm_starting"
    retry_after = 5


class Unavailable(ServingError):
    """No replica could answer."""

    status, code = 503, "unavailable"


class WrongSpace(Unavailable):
    """Vectors are of another embedding space than the release's. They are never returned."""

    def __init__(self, answered: str, space: str) -> None:
        super().__init__(
            f"an encoder answered in the embedding space {answered!r}, and the release has {space!r}.",
            "Send the request again; an operator must look at the encoders.",
        )


class AdapterUnservable(Unavailable):
    """The release itself cannot be served: another replica would not help. The guard counts these."""


class EngineDead(ServingError):
    """The engine ended; Serve replaces its replica."""

    status, code = 503, "unavailable"

    def __init__(self, message: str, fix: str = "Start a new engine.") -> None:
        super().__init__(message, fix)


class DeadlineExceeded(ServingError):
    """The deadline passed before the answer was ready."""

    status, code = 504, "deadline_exceeded"
