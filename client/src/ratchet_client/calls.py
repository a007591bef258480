"""The calls of the HTTP API: the request of each, and the parser of its answer. No input or output.

Both clients have a method for each of these functions; it returns what the call reads from the answer.
"""

from __future__ import annotations

import base64
import json
import random
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from types import EllipsisType
from typing import Any, Generic, TypeVar

import httpx

from ratchet_client.errors import Conflict, Denied, Overloaded, ServerError, TimedOut, Unreachable
from ratchet_client.models import Family

T = TypeVar("T")
READY_SECONDS = 15.0
LOOK_SECONDS = 0.1
RELEASE_SECONDS = 3600.0
"""A release may have to load models and to embed the catalog again before it is live."""

FIRST_PAUSE = 0.25
LONGEST_PAUSE = 8.0
"""Seconds. Each pause is twice as long as the one before, and up to half of it is left to chance, so that clients that
failed together do not come back together."""


RECEIPT: ContextVar[str] = ContextVar("ratchet_answer", default="")
SPACES: ContextVar[tuple[str, str]] = ContextVar("ratchet_spaces", default=("", ""))


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and what makes a result of its answer."""

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    body: Mapping[str, Any] | None = None
    """JSON, for a POST."""
    query: Mapping[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    """Seconds; None: those of the client."""
    repeatable: bool = True
    """True for a call that changes nothing, so that it may be repeated after a failure."""
    check: bool = True
    """True where a status of 400 or above is an error."""

    def options(self) -> dict[str, Any]:
        """Arguments of httpx's ``request``."""
        options: dict[str, Any] = {"method": self.method, "url": self.path, "params": self.query}
        if self.body is not None:
            options["json"] = self.body
        return options if self.timeout is None else {**options, "timeout": self.timeout}

    def result(self, answer: httpx.Response) -> T:
        """Parse the answer. Raises ServerError, or one of its subclasses."""
        if self.check and answer.status_code >= 400:
            raise error_of(answer)
        if receipt := answer.headers.get("x-ratchet-answer"):
            RECEIPT.set(receipt)
        if space := answer.headers.get("x-ratchet-image-space"):
            SPACES.set((space, answer.headers.get("x-ratchet-text-space", "")))
        try:
            return self.read(answer)
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{answer.url} gave an answer of another form ({type(error).__name__}: {error}).",
                "Is this the address of a Ratchet server?",
                answer.status_code,
            ) from error


def data_uri(image: bytes) -> str:
    """An encoded image as the API takes it."""
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def headers(key: str | None, actor: str) -> dict[str, str]:
    """Headers of every request."""
    return {"x-ratchet-actor": actor} | ({"authorization": f"Bearer {key}"} if key else {})


def embed(inputs: Sequence[str | bytes], model: str = "clip", space: str | None = None) -> Call[list[array[float]]]:
    """Unit vectors of texts (str) and encoded images (bytes), each an array of float32, as numpy takes them. ``space``:
    an embedding space that they must belong to, or that the images have that they are compared with; Conflict
    (``space_gone``) if no resident release has it. :func:`last_spaces` names the spaces of what was answered.

    >>> numpy.asarray(client.embed(["a red dragon", "a bus"])).shape
    (2, 256)
    """
    items = [{"image": data_uri(item)} if isinstance(item, bytes) else item for item in inputs]
    body = {"model": model, "input": items, "encoding_format": "base64", "space": space}
    return Call("POST", "/v1/embeddings", lambda answer: [_vector(row["embedding"]) for row in _data(answer)], body)


def classify(
    images: Sequence[bytes],
    labels: Sequence[str],
    templates: Sequence[str] = ("{}",),
    model: str = "clip",
    min_probability: float | None = None,
) -> Call[list[dict[str, Any]]]:
    """For each image its ``label``, the ``probabilities``, and ``matches``: by label the probability that the image
    shows it, None without a calibration. Below ``min_probability`` the label is None."""
    body = {"images": list(map(data_uri, images)), "labels": list(labels), "templates": list(templates), "model": model}
    least = {} if min_probability is None else {"min_probability": min_probability}
    return Call("POST", "/v1/classify", _data, body | least)


def search(text: str | None = None, image: bytes | None = None, **options: Any) -> Call[list[dict[str, Any]]]:
    """Hits, best first. ``options``: the other fields of the call, such as ``id`` or ``vector``, ``k`` and ``labels``.
    For several queries and further pages see :func:`search_all`.
    """
    body = {"text": text, "image": None if image is None else data_uri(image), **options}
    return Call("POST", "/v1/search", _data, body)


def rerank(
    query: str | bytes, documents: Sequence[str | bytes | Mapping[str, str]], model: str = "vlm", **options: Any
) -> Call[list[dict[str, Any]]]:
    """For each document its ``index`` and ``relevance_score``, the best first. Texts are str, encoded images bytes,
    samples ``{"id": ...}``. ``options``: top_n, return_documents.

    >>> client.rerank("a red bus", [red, blue], top_n=1)[0]["index"]
    0
    """
    asked, *items = [{"image": data_uri(item)} if isinstance(item, bytes) else item for item in (query, *documents)]
    body = {"model": model, "query": asked, "documents": items, **options}
    return Call("POST", "/v1/rerank", lambda answer: list(_object(answer)["results"]), body)


def search_all(**body: Any) -> Call[dict[str, Any]]:
    """The whole answer: the ``space``, ``data`` or the ``results`` of several ``queries``, and ``next``, the cursor of
    the next page.

    >>> query = {"queries": [{"text": "a bus"}, {"id": sample}], "k": 20}
    >>> first = client.search_all(**query)
    >>> second = client.search_all(**query, cursor=first["next"])
    """
    return Call("POST", "/v1/search", _object, body)


def sample_image(sample_id: str, size: int = 256) -> Call[bytes]:
    """A sample's image as PNG."""
    return Call("GET", f"/v1/samples/{sample_id}/image", lambda answer: answer.content, query={"size": size})


def vqa(image: bytes, question: str, choices: Sequence[str] | None = None, model: str = "vlm") -> Call[dict[str, Any]]:
    """The ``answer`` to a question about an encoded image; with ``choices`` also their probabilities."""
    body = {"image": data_uri(image), "question": question, "model": model}
    return Call("POST", "/v1/vqa", _object, body if choices is None else {**body, "choices": list(choices)})


def chat(content: str | Sequence[str | bytes], model: str = "vlm", **options: Any) -> Call[dict[str, Any]]:
    """One turn of texts (str) and encoded images (bytes); OpenAI's ``chat.completion``, or its options."""
    parts = [content] if isinstance(content, str) else content
    turn = [
        {"type": "image_url", "image_url": {"url": data_uri(part)}}
        if isinstance(part, bytes)
        else {"type": "text", "text": part}
        for part in parts
    ]
    body = {"model": model, "messages": [{"role": "user", "content": turn}], **options}
    return Call("POST", "/v1/chat/completions", _object, body)


def feedback(answer: str, verdict: str, image: bytes | None = None, **said: Any) -> Call[dict[str, Any]]:
    """Report an answer, by the receipt that :func:`last_answer` returns: ``right``, ``wrong``, ``correct`` with
    ``label=`` or ``text=``, or ``chosen`` with ``position=`` or ``object_id=``. The image of a wrong answer goes to a
    review, to learn from. Counted once, so it may be repeated.

    >>> client.classify([image], ["car", "bus"])
    >>> client.feedback(last_answer(), "correct", label="bus")["repeated"]
    False
    """
    said |= {"image": data_uri(image)} if image is not None else {}
    return Call("POST", "/v1/feedback", _object, {"answer": answer, "verdict": verdict, **said})


def last_answer() -> str:
    """Receipt of the last answer to this thread or task (``x-ratchet-answer``); empty before the first."""
    return RECEIPT.get()


def last_spaces() -> tuple[str, str]:
    """Image and text embedding space of the last answer to this thread or task; empty before the first. Keep them
    beside vectors that you store."""
    return SPACES.get()


def spaces() -> Call[list[dict[str, Any]]]:
    """The embedding spaces that requests may name, those of the live release first."""
    return Call("GET", "/v1/spaces", _data)


def releases(limit: int = 50) -> Call[dict[str, Any]]:
    """``live`` and the rows in ``data``, newest first."""
    return get("/v1/releases", limit=limit)


def live() -> Call[int]:
    """Number of the live release."""
    return Call("GET", "/v1/releases", lambda answer: int(_object(answer)["live"] or 0), query={"limit": 1})


def status() -> Call[dict[str, Any]]:
    """Controller, VLM engines and catalog at a glance; needs the key."""
    return get("/admin/v1/status")


def metrics() -> Call[str]:
    """The server's metrics, as Prometheus scrapes them."""
    return Call("GET", "/metrics", lambda answer: answer.text)


def release(
    clip: str | EllipsisType | None = ...,
    reason: str = "",
    expected_live: int | None = None,
    timeout: float = RELEASE_SECONDS,
    *,
    vlm: str | EllipsisType | None = ...,
    share: float = 1.0,
    force: bool = False,
) -> Call[dict[str, Any]]:
    """Release adapters (None: the base alone; not named: what is live stays); returns when all replicas serve it.

    Args:
        share: of the requests; below 1 a canary, 0 a shadow.
        force: also what no gate passed and was never live.

    >>> client.release(vlm="vlm-0123456789ab", reason="right after all")
    """
    body: dict[str, Any] = {"reason": reason, "expected_live": expected_live, "share": share, "force": force}
    body |= {family: name for family, name in (("clip", clip), ("vlm", vlm)) if name is not ...}
    return post("/admin/v1/releases", body, timeout)


def promote(reason: str, expected_live: int | None = None) -> Call[dict[str, Any]]:
    """Let the canary or shadow that is live answer everybody."""
    return post("/admin/v1/promote", {"reason": reason, "expected_live": expected_live})


def rollback(
    reason: str,
    to: int | None = None,
    expected_live: int | None = None,
    timeout: float = RELEASE_SECONDS,
    *,
    family: Family | None = None,
) -> Call[dict[str, Any]]:
    """Go back to the newest release with another adapter, or to ``to``; with ``family`` only that adapter."""
    body = {"reason": reason, "to": to, "expected_live": expected_live, "family": family}
    return post("/admin/v1/rollback", body, timeout)


def hold(reason: str) -> Call[dict[str, Any]]:
    """Let updates wait."""
    return post("/admin/v1/hold", {"reason": reason})


def resume(reason: str) -> Call[dict[str, Any]]:
    """Let updates through."""
    return post("/admin/v1/resume", {"reason": reason})


def get(path: str, **query: Any) -> Call[dict[str, Any]]:
    """One GET of JSON."""
    return Call("GET", path, _object, query=query)


def post(path: str, body: Mapping[str, Any], timeout: float | None = None) -> Call[dict[str, Any]]:
    """One POST of JSON; it is made once, whatever comes of it."""
    return Call("POST", path, _object, body, timeout=timeout, repeatable=False)


def why_not_ready(model: Family) -> Call[str]:
    def read(answer: httpx.Response) -> str:
        if answer.status_code == 200 or (model == "vlm" and answer.status_code == 404 and "no_vlm" in answer.text):
            return ""
        return _said(answer).get("message") or answer.text[:300] or f"status {answer.status_code}"

    path = f"/health/ready/{model}"
    return Call("GET", path, read, timeout=READY_SECONDS, repeatable=False, check=False)


_FIXES: dict[type[ServerError], str] = {
    Overloaded: "Try again later.",
    Denied: "Give a `key` that the server accepts for this call.",
    Conflict: "Look at `releases()`, and decide again.",
}


def error_of(answer: httpx.Response) -> ServerError:
    """The error of an answer with a status of 400 or more. The server's own message says what to do."""
    said, status = _said(answer), answer.status_code
    kind = {401: Denied, 403: Denied, 409: Conflict, 429: Overloaded, 503: Overloaded}.get(status, ServerError)
    return kind(
        said.get("message") or answer.text[:300] or f"the server answered with status {status}.",
        "" if said else _FIXES.get(kind, ""),
        status,
        code=said.get("code", ""),
        request_id=answer.headers.get("x-request-id", ""),
        retry_after=_retry_after(answer.headers.get("retry-after", "")),
    )


def as_server_error(url: str, error: ServerError | httpx.TransportError) -> ServerError:
    """The same error; Unreachable or TimedOut for a request that got no answer."""
    if isinstance(error, ServerError):
        return error
    what = f"{type(error).__name__}: {error}".rstrip(": ")
    if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
        fix = "Ask for less at once, or allow a longer `timeout`."
        return TimedOut(f"{url} did not answer in time ({what}).", fix)
    return Unreachable(f"{url} does not answer ({what}).", "Is `ratchet serve` running there?")


def problem_of(error: Unreachable) -> str:
    """Reason that :func:`why_not_ready` gives for a server that does not answer."""
    return "it does not answer in time." if isinstance(error, TimedOut) else "nothing listens there yet."


def not_ready(url: str, seconds: float, problem: str) -> ServerError:
    """The error of a server that was not ready in time."""
    return ServerError(f"{url} was not ready within {seconds:.0f} s: {problem}", "Look at the server's log.")


def _said(answer: httpx.Response) -> dict[str, str]:
    """The texts of OpenAI's error object; empty where the answer holds none."""
    try:
        return {name: text for name, text in answer.json()["error"].items() if isinstance(text, str)}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _retry_after(text: str) -> float | None:
    """Seconds of a ``Retry-After`` (RFC 9110, 10.2.3): a number of them, or a date."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(text)
        return max(0.0, (at - at.now(at.tzinfo)).total_seconds())
    except ValueError:
        return None


def _object(answer: httpx.Response) -> dict[str, Any]:
    value = json.loads(answer.content)
    if not isinstance(value, dict):
        raise TypeError(f"a JSON {type(value).__name__}")
    return value


def _data(answer: httpx.Response) -> list[dict[str, Any]]:
    data: list[dict[str, Any]] = _object(answer)["data"]
    return data


def _vector(text: str) -> array[float]:
    vector = array("f", base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        vector.byteswap()
    return vector


class Retries:
    """The tries of one call.

    Another try is made where the call changes nothing, and the server was away or had too much to do. A call that was
    not answered in time is not made again: the server has not ended the first one yet. All pauses together are shorter
    than the timeout of the call.
    """

    def __init__(self, call: Call[Any], retries: int, timeout: float) -> None:
        self._left = retries if call.repeatable else 0
        self._pause = FIRST_PAUSE
        self._ends_at = time.monotonic() + (timeout if call.timeout is None else call.timeout)

    def pause_after(self, error: ServerError) -> float:
        """Seconds to wait before the next try; raises the error where there is to be none."""
        passing = isinstance(error, (Overloaded, Unreachable)) and not isinstance(error, TimedOut)
        pause = self._pause * random.uniform(0.5, 1.0) + (error.retry_after or 0.0)  # noqa: S311  no secret
        if not (passing and self._left) or time.monotonic() + pause > self._ends_at:
            raise error from error.__cause__  # a TransportError says no more than it does
        self._left -= 1
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        return pause
