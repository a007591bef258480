"""The synchronous client of the HTTP API.

>>> with Client("http://127.0.0.1:8000") as client:
...     [vector] = client.embed(["a red dragon"])
...     len(vector)
256
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

import httpx

from ratchet_client import calls
from ratchet_client.calls import Call, Retries
from ratchet_client.errors import ServerError, Unreachable
from ratchet_client.models import FAMILIES, Family

P = ParamSpec("P")
T = TypeVar("T")


def _method(make: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """The method that makes a call and returns its result."""

    def method(self: Client, /, *args: P.args, **named: P.kwargs) -> T:
        return self._call(make(*args, **named))

    return calls.described(method, make)


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
