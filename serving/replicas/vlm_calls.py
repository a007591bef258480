"""Calls to VLM replicas that survive the death of one.

An answer has no side effect, so a call whose replica died is made again on another one. A stream is asked again only
before its first chunk: what a client has seen cannot be taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, Unavailable
from serving.messages import Refusal
from serving.ray.replica_calls import Attempts, call_replica, queue_full
from serving.releases.release_snapshot import ReleaseSnapshot

OTHER_TRIES: Final = 2
"""After a replica that cannot load the adapter: another one may have its files."""


class VlmCalls:
    """Implements :class:`serving.http.app_state.Vlms`; bounds the requests that wait or run."""

    def __init__(self, handle: DeploymentHandle, limit: int) -> None:
        self.handle = handle
        self.streams = handle.options(stream=True)
        self.limit = limit
        self.running = 0

    async def reply(self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """The whole answer, by the snapshot's adapter.

        Args:
            deadline: on the monotonic clock.

        Raises:
            InvalidRequest, QueueFull, DeadlineExceeded, Unavailable.
        """
        with self._place():
            attempts = _attempts(deadline)
            call = lambda: self.handle.reply.remote(request, snapshot.vlm, attempts.left)  # noqa: E731
            result: GenerationResult = await _ask(call, attempts, snapshot)
            return result

    async def probe(self, snapshot: ReleaseSnapshot, deadline: float) -> None:
        """Have a replica make a token, whatever waits. Raises as :meth:`reply`, QueueFull from one that is busy."""
        attempts = _attempts(deadline)
        await _ask(lambda: self.handle.probe.remote(snapshot.vlm, attempts.left), attempts, snapshot)

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """Log-probability of each choice as the whole answer. Raises as :meth:`reply`."""
        with self._place():
            attempts = _attempts(deadline)
            call = lambda: self.handle.score.remote(request, tuple(choices), snapshot.vlm, attempts.left)  # noqa: E731
            scores: list[float] = await _ask(call, attempts, snapshot)
            return scores

    async def stream(
        self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float
    ) -> AsyncIterator[TokenChunk]:
        """The answer chunk by chunk; the last one has a ``finish``. Closing it aborts the request.

        Raises as :meth:`reply`: before the first chunk, or in the middle when the replica died or the time is over.
        """
        with self._place():
            attempts = _attempts(deadline)
            while attempts.left > 0:
                response, last = self.streams.stream.remote(request, snapshot.vlm, attempts.left), None
                try:
                    while True:
                        async with asyncio.timeout(attempts.left):
                            chunk = _value(await anext(response, None), snapshot)
                        if chunk is None:
                            break
                        last = chunk
                        yield chunk
                    if last is not None and last.finish:
                        return
                    raise EOFError("the stream ended too early")
                except BackPressureError:
                    raise queue_full() from None
                except TimeoutError:
                    break
                except (InvalidRequest, DeadlineExceeded, Unavailable):
                    raise
                except Exception as error:
                    if last is not None:
                        raise Unavailable(
                            f"the answer broke off ({type(error).__name__}).", "Ask again; nothing was kept."
                        ) from None
                    await attempts.failed(error)
                finally:
                    response.cancel()
            raise attempts.over()

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self.running >= self.limit:
            raise queue_full()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


def _attempts(deadline: float) -> Attempts:
    return Attempts(deadline - time.monotonic(), "VLM", "Ask for fewer tokens, or try again later.")


async def _ask(call: Callable[[], Any], attempts: Attempts, snapshot: ReleaseSnapshot) -> Any:
    answer = await call_replica(call, attempts)
    for _ in range(OTHER_TRIES):
        if not (isinstance(answer, Refusal) and answer.code == "adapter"):
            break
        await attempts.failed(answer.message)
        answer = await call_replica(call, attempts)
    return _value(answer, snapshot)


def _value(answer: Any, snapshot: ReleaseSnapshot) -> Any:
    if not isinstance(answer, Refusal):
        return answer
    if answer.code == "ask":
        raise InvalidRequest(answer.message, answer.fix)
    if answer.code == "busy":
        raise queue_full()
    if answer.code == "late":
        raise DeadlineExceeded(answer.message, answer.fix)
    raise AdapterUnservable(
        f"{snapshot.vlm_adapter} cannot be served: {answer.message}", "An operator must look at it."
    )
