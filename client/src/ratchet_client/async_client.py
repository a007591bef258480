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
from collections.abc import Callable, Coroutine, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx

from ratchet_client import calls
from ratchet_client.calls import Call, Retries
from ratchet_client.errors import ServerError, Unreachable
from ratchet_client.models import FAMILIES, Family

P = ParamSpec("P")
T = TypeVar("T")


def _method(make: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """The method that makes a call and returns its result."""

    async def method(self: AsyncClient, /, *args: P.args, **named: P.kwargs) -> T:
        return await self._call(make(*args, **named))

    return calls.described(method, make)


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

    embed = _method(calls.embed)
    classify = _method(calls.classify)
    search = _method(calls.search)
    sample_image = _method(calls.sample_image)
    vqa = _method(calls.vqa)
    chat = _method(calls.chat)
    releases = _method(calls.releases)
    live = _method(calls.live)
    status = _method(calls.status)
    metrics = _method(calls.metrics)
    release = _method(calls.release)
    promote = _method(calls.promote)
    rollback = _method(calls.rollback)
    hold = _method(calls.hold)
    resume = _method(calls.resume)
    get = _method(calls.get)
    post = _method(calls.post)

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
