"""The clients of the HTTP API: one that blocks, and one for programs that run in an event loop.

>>> with Client("http://127.0.0.1:8000") as client:
...     [vector] = client.embed(["a red dragon"])
...     len(vector)
256
>>> async with AsyncClient("http://127.0.0.1:8000") as client:
...     [vector] = await client.embed(["a red dragon"])
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, ClassVar, Generic, ParamSpec, Self, TypeVar, overload

import httpx

from ratchet_client import calls
from ratchet_client.calls import Call, Retries
from ratchet_client.errors import ServerError, Unreachable
from ratchet_client.models import FAMILIES, Family

P = ParamSpec("P")
T = TypeVar("T")


class _Method(Generic[P, T]):
    """The method that makes a call: of a Client it returns the result, of an AsyncClient a coroutine of it."""

    def __init__(self, make: Callable[P, Call[T]]) -> None:
        self.make = make

    @overload
    def __get__(self, client: None, kind: type[object]) -> Callable[P, Call[T]]: ...
    @overload
    def __get__(self, client: Client, kind: type[object]) -> Callable[P, T]: ...
    @overload
    def __get__(self, client: AsyncClient, kind: type[object]) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, client: Client | AsyncClient | None, kind: type[object]) -> Any:
        if client is None:
            return self.make  # `help` shows its arguments

        if isinstance(client, AsyncClient):

            @functools.wraps(self.make)
            async def coroutine(*args: P.args, **named: P.kwargs) -> T:
                return await client._call(self.make(*args, **named))

            return coroutine

        @functools.wraps(self.make)
        def method(*args: P.args, **named: P.kwargs) -> T:
            return client._call(self.make(*args, **named))

        return method


class _Calls:
    """The arguments and the calls of both clients."""

    _connect: ClassVar[type[httpx.Client] | type[httpx.AsyncClient]]
    _http: httpx.Client | httpx.AsyncClient

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
        self._http = self._connect(
            base_url=url, headers=calls.headers(key, actor), timeout=timeout, trust_env=False, verify=verify
        )

    embed = _Method(calls.embed)
    classify = _Method(calls.classify)
    search = _Method(calls.search)
    search_all = _Method(calls.search_all)
    sample_image = _Method(calls.sample_image)
    vqa = _Method(calls.vqa)
    chat = _Method(calls.chat)
    feedback = _Method(calls.feedback)
    rerank = _Method(calls.rerank)
    spaces = _Method(calls.spaces)
    releases = _Method(calls.releases)
    live = _Method(calls.live)
    status = _Method(calls.status)
    metrics = _Method(calls.metrics)
    release = _Method(calls.release)
    promote = _Method(calls.promote)
    rollback = _Method(calls.rollback)
    hold = _Method(calls.hold)
    resume = _Method(calls.resume)
    get = _Method(calls.get)
    post = _Method(calls.post)


class Client(_Calls):
    """Calls one server. Thread safe.

    Every method raises ServerError, or the subclass that says more: see :mod:`ratchet_client.errors`.
    """

    _connect = httpx.Client
    _http: httpx.Client

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

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

    def _call(self, call: Call[T]) -> T:
        retries = Retries(call, self._retries, self._timeout)
        while True:
            try:
                return call.result(self._http.request(**call.options()))
            except (ServerError, httpx.TransportError) as error:
                pause = retries.pause_after(calls.as_server_error(self.url, error))
            time.sleep(pause)


class AsyncClient(_Calls):
    """Calls one server, as :class:`Client` does, from one event loop."""

    _connect = httpx.AsyncClient
    _http: httpx.AsyncClient

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

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
                return call.result(await self._http.request(**call.options()))
            except (ServerError, httpx.TransportError) as error:
                pause = retries.pause_after(calls.as_server_error(self.url, error))
            await asyncio.sleep(pause)
