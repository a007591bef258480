"""The client of the HTTP API for programs that run in an event loop.

>>> async with AsyncClient("http://127.0.0.1:8000") as client:
...     [vector] = await client.embed(["a red dragon"])
...     len(vector)
256
"""

from __future__ import annotations

import asyncio
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


class AsyncClient:
    """Calls one server, as :class:`ratchet_client.Client` does, from one event loop.

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
        """Connects with the first call. The arguments are those of :class:`ratchet_client.Client`."""
        self.url = url
        self._timeout = timeout
        self._retries = retries
        self._http = httpx.AsyncClient(
            base_url=url, headers=calls.headers(key, actor), timeout=timeout, trust_env=False, verify=verify
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def embed(self, inputs: Sequence[str | bytes], model: str = "clip") -> list[array[float]]:
        """Unit vectors of texts (str) and encoded images (bytes), each an array of float32, as numpy takes them.

        >>> numpy.asarray(await client.embed(["a red dragon", "a bus"])).shape
        (2, 256)
        """
        return await self._call(calls.embed(inputs, model))

    async def classify(
        self, images: Sequence[bytes], labels: Sequence[str], templates: Sequence[str] = ("{}",), model: str = "clip"
    ) -> list[dict[str, Any]]:
        """For each image its ``label`` and the ``probabilities``."""
        return await self._call(calls.classify(images, labels, templates, model))

    async def search(self, text: str | None = None, image: bytes | None = None, **options: Any) -> list[dict[str, Any]]:
        """Hits, best first. ``options``: k, domain, source, since, until, model."""
        return await self._call(calls.search(text, image, options))

    async def sample_image(self, sample_id: str, size: int = 256) -> bytes:
        """A sample's image as PNG."""
        return await self._call(calls.sample_image(sample_id, size))

    async def vqa(
        self, image: bytes, question: str, choices: Sequence[str] | None = None, model: str = "vlm"
    ) -> dict[str, Any]:
        """The ``answer`` to a question about an encoded image; with ``choices`` also their probabilities."""
        return await self._call(calls.vqa(image, question, choices, model))

    async def chat(self, content: str | Sequence[str | bytes], model: str = "vlm", **options: Any) -> dict[str, Any]:
        """One turn of texts (str) and encoded images (bytes); OpenAI's ``chat.completion``, or its options."""
        return await self._call(calls.chat(content, model, options))

    async def releases(self, limit: int = 50) -> dict[str, Any]:
        """``live`` and the rows in ``data``, newest first."""
        return await self._call(calls.releases(limit))

    async def live(self) -> int:
        """Number of the live release."""
        return await self._call(calls.live())

    async def status(self) -> dict[str, Any]:
        """Controller, VLM engines and catalog at a glance; needs the key."""
        return await self.get("/admin/v1/status")

    async def metrics(self) -> str:
        """The server's metrics, as Prometheus scrapes them."""
        return await self._call(calls.metrics())

    async def release(
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

        >>> await client.release(vlm="vlm-0123456789ab", reason="right after all")
        """
        adapters: dict[Family, str | EllipsisType | None] = {"clip": clip, "vlm": vlm}
        return await self._call(calls.release(adapters, reason, expected_live, timeout, share, force))

    async def promote(self, reason: str, expected_live: int | None = None) -> dict[str, Any]:
        """Let the canary or shadow that is live answer everybody."""
        return await self.post("/admin/v1/promote", {"reason": reason, "expected_live": expected_live})

    async def rollback(
        self,
        reason: str,
        to: int | None = None,
        expected_live: int | None = None,
        timeout: float = RELEASE_SECONDS,
        *,
        family: Family | None = None,
    ) -> dict[str, Any]:
        """Go back to the newest release with another adapter, or to ``to``; with ``family`` only that adapter."""
        return await self._call(calls.rollback(reason, to, expected_live, timeout, family))

    async def hold(self, reason: str) -> None:
        """Let updates wait."""
        await self.post("/admin/v1/hold", {"reason": reason})

    async def resume(self, reason: str) -> None:
        """Let updates through."""
        await self.post("/admin/v1/resume", {"reason": reason})

    async def is_ready(self, models: Sequence[Family] = FAMILIES) -> bool:
        """Return True when these models answer; the VLM counts where one is served."""
        return not any([await self.why_not_ready(model) for model in models])

    async def wait_ready(self, seconds: float, models: Sequence[Family] = FAMILIES) -> None:
        """Return when these models answer. Raises ServerError with the server's last answer when it is not in time."""
        ends_at = time.monotonic() + seconds
        waiting = list(models)
        while waiting:
            if not (problem := await self.why_not_ready(waiting[0])):
                del waiting[0]
            elif time.monotonic() > ends_at:
                raise calls.not_ready(self.url, seconds, problem)
            else:
                await asyncio.sleep(calls.LOOK_SECONDS)

    async def why_not_ready(self, model: Family) -> str:
        """Return the reason why a model does not answer; empty when it does, or for the VLM where none is served."""
        try:
            return await self._call(calls.why_not_ready(model))
        except Unreachable as error:
            return calls.problem_of(error)

    async def get(self, path: str, **query: Any) -> dict[str, Any]:
        """One GET of JSON."""
        return await self._call(calls.get(path, query))

    async def post(self, path: str, body: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
        """One POST of JSON; it is made once, whatever comes of it."""
        return await self._call(calls.post(path, body, timeout))

    async def _call(self, call: Call[T]) -> T:
        retries = Retries(call, self._retries, self._timeout)
        while True:
            try:
                return await self._try(call)
            except ServerError as error:
                pause = retries.pause_after(error)
            await asyncio.sleep(pause)

    async def _try(self, call: Call[T]) -> T:
        try:
            answer = await self._http.request(**call.options())
        except httpx.TransportError as error:
            raise calls.unreachable(self.url, error) from None
        return call.result(answer)
