"""The synchronous client of the HTTP API.

>>> with Client("http://127.0.0.1:8000") as client:
...     [vector] = client.embed(["a red dragon"])
...     len(vector)
256
"""

from __future__ import annotations

import ssl
import time
from array import array
from collections.abc import Sequence
from types import EllipsisType, TracebackType
from typing import Any, TypeVar

import httpx

from ratchet_client import calls
from ratchet_client.calls import RELEASE_SECONDS, Call, Retries
from ratchet_client.errors import ServerError, Unreachable
from ratchet_client.models import FAMILIES, Family

T = TypeVar("T")


class Client:
    """Calls one server. Thread safe.

    Every method raises ServerError, or the subclass that says more: see :mod:`ratchet_client.errors`.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        actor: str = "operator",
        timeout: float = 60.0,
        retries: int = 3,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        """Connects with the first call.

        Args:
            url: ``http://host:port`` of the server. Proxies that the environment names are not used.
            key: an API key, where the server asks for one; releases, rollbacks, hold and resume need the scope
                ``operate``, or the operators' own key.
            actor: name that the audit log has for what is changed with the operators' own key.
            timeout: seconds until an answer has to be there.
            retries: further tries of a call that changes nothing (see :class:`ratchet_client.calls.Retries`); calls
                that change releases are made once.
            verify: how a certificate is checked, as httpx takes it.
        """
        self.url = url
        self._timeout = timeout
        self._retries = retries
        self._http = httpx.Client(
            base_url=url, headers=calls.headers(key, actor), timeout=timeout, trust_env=False, verify=verify
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def embed(self, inputs: Sequence[str | bytes], model: str = "clip") -> list[array[float]]:
        """Unit vectors of texts (str) and encoded images (bytes), each an array of float32, as numpy takes them.

        >>> numpy.asarray(client.embed(["a red dragon", "a bus"])).shape
        (2, 256)
        """
        return self._call(calls.embed(inputs, model))

    def classify(
        self, images: Sequence[bytes], labels: Sequence[str], templates: Sequence[str] = ("{}",), model: str = "clip"
    ) -> list[dict[str, Any]]:
        """For each image its ``label`` and the ``probabilities``."""
        return self._call(calls.classify(images, labels, templates, model))

    def search(self, text: str | None = None, image: bytes | None = None, **options: Any) -> list[dict[str, Any]]:
        """Hits, best first. ``options``: k, domain, source, since, until, model."""
        return self._call(calls.search(text, image, options))

    def sample_image(self, sample_id: str, size: int = 256) -> bytes:
        """A sample's image as PNG."""
        return self._call(calls.sample_image(sample_id, size))

    def vqa(
        self, image: bytes, question: str, choices: Sequence[str] | None = None, model: str = "vlm"
    ) -> dict[str, Any]:
        """The ``answer`` to a question about an encoded image; with ``choices`` also their probabilities."""
        return self._call(calls.vqa(image, question, choices, model))

    def chat(self, content: str | Sequence[str | bytes], model: str = "vlm", **options: Any) -> dict[str, Any]:
        """One turn of texts (str) and encoded images (bytes); OpenAI's ``chat.completion``, or its options."""
        return self._call(calls.chat(content, model, options))

    def releases(self, limit: int = 50) -> dict[str, Any]:
        """``live`` and the rows in ``data``, newest first."""
        return self._call(calls.releases(limit))

    def live(self) -> int:
        """Number of the live release."""
        return self._call(calls.live())

    def status(self) -> dict[str, Any]:
        """Controller, VLM engines and catalog at a glance; needs the key."""
        return self.get("/admin/v1/status")

    def metrics(self) -> str:
        """The server's metrics, as Prometheus scrapes them."""
        return self._call(calls.metrics())

    def release(
        self,
        clip: str | EllipsisType | None = ...,
        reason: str = "",
        expected_live: int | None = None,
        timeout: float = RELEASE_SECONDS,
        *,
        vlm: str | EllipsisType | None = ...,
        share: float = 1.0,
        force: bool = False,
    ) -> dict[str, Any]:
        """Release adapters (None: the base alone; not named: what is live stays); returns when all replicas serve it.

        Args:
            share: of the requests; below 1 a canary, 0 a shadow.
            force: also what no gate passed and was never live.

        >>> client.release(vlm="vlm-0123456789ab", reason="right after all")
        """
        adapters: dict[Family, str | EllipsisType | None] = {"clip": clip, "vlm": vlm}
        return self._call(calls.release(adapters, reason, expected_live, timeout, share, force))

    def promote(self, reason: str, expected_live: int | None = None) -> dict[str, Any]:
        """Let the canary or shadow that is live answer everybody."""
        return self.post("/admin/v1/promote", {"reason": reason, "expected_live": expected_live})

    def rollback(
        self,
        reason: str,
        to: int | None = None,
        expected_live: int | None = None,
        timeout: float = RELEASE_SECONDS,
        *,
        family: Family | None = None,
    ) -> dict[str, Any]:
        """Go back to the newest release with another adapter, or to ``to``; with ``family`` only that adapter."""
        return self._call(calls.rollback(reason, to, expected_live, timeout, family))

    def hold(self, reason: str) -> None:
        """Let updates wait."""
        self.post("/admin/v1/hold", {"reason": reason})

    def resume(self, reason: str) -> None:
        """Let updates through."""
        self.post("/admin/v1/resume", {"reason": reason})

    def is_ready(self, models: Sequence[Family] = FAMILIES) -> bool:
        """Return True when these models answer; the VLM counts where one is served."""
        return not any(self.why_not_ready(model) for model in models)

    def wait_ready(self, seconds: float, models: Sequence[Family] = FAMILIES) -> None:
        """Return when these models answer. Raises ServerError with the server's last answer when it is not in time."""
        ends_at = time.monotonic() + seconds
        waiting = list(models)
        while waiting:
            if not (problem := self.why_not_ready(waiting[0])):
                del waiting[0]
            elif time.monotonic() > ends_at:
                raise calls.not_ready(self.url, seconds, problem)
            else:
                time.sleep(calls.LOOK_SECONDS)

    def why_not_ready(self, model: Family) -> str:
        """Return the reason why a model does not answer; empty when it does, or for the VLM where none is served."""
        try:
            return self._call(calls.why_not_ready(model))
        except Unreachable as error:
            return calls.problem_of(error)

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """One GET of JSON."""
        return self._call(calls.get(path, query))

    def post(self, path: str, body: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """One POST of JSON; it is made once, whatever comes of it."""
        return self._call(calls.post(path, body, timeout))

    def _call(self, call: Call[T]) -> T:
        retries = Retries(call, self._retries, self._timeout)
        while True:
            try:
                return self._try(call)
            except ServerError as error:
                pause = retries.pause_after(error)
            time.sleep(pause)

    def _try(self, call: Call[T]) -> T:
        try:
            answer = self._http.request(**call.options())
        except httpx.TransportError as error:
            raise calls.unreachable(self.url, error) from None
        return call.result(answer)
