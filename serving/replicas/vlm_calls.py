"""Calls to VLM replicas that survive the death of one.

An answer has no side effect, so a call whose replica died is made again on another one. A stream is asked again only
before its first piece: what a client has seen cannot be taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serving.engines.vlm.generation import GenerationRequest, GenerationResult, Message, TokenChunk
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, QueueFull, Unavailable
from serving.messages import Refusal
from serving.releases.release_snapshot import ReleaseSnapshot

PROBE = GenerationRequest((Message("user", ("alive?",)),), max_tokens=1)
"""One forward pass, for health checks: it gets in when the queue is full."""


class VlmCalls:
    """Implements :class:`serving.http.app_state.Vlms`; bounds the requests that wait or run."""

    def __init__(self, handle: DeploymentHandle, limit: int) -> None:
        self.handle = handle
        self.streams = handle.options(stream=True)
        self.limit = limit
        self.running = 0

    async def reply(self, ask: GenerationRequest, stamp: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """The whole answer, by the stamp's adapter.

        Args:
            deadline: seconds since the epoch.

        Raises:
            InvalidRequest, QueueFull, DeadlineExceeded, Unavailable.
        """
        with self._place(ask):
            reply: GenerationResult = await self._one(
                lambda: self.handle.reply.remote(ask, stamp.vlm, deadline), stamp, deadline
            )
            return reply

    async def score(
        self, ask: GenerationRequest, choices: Sequence[str], stamp: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """Log-probability of each choice as the whole answer. Raises as :meth:`reply`."""
        with self._place(ask):
            call = lambda: self.handle.score.remote(ask, tuple(choices), stamp.vlm, deadline)  # noqa: E731
            scores: list[float] = await self._one(call, stamp, deadline)
            return scores

    async def stream(
        self, ask: GenerationRequest, stamp: ReleaseSnapshot, deadline: float
    ) -> AsyncIterator[TokenChunk]:
        """The answer piece by piece; the last one has a ``finish``. Closing it aborts the request.

        Raises as :meth:`reply`: before the first piece, or in the middle when the replica died or the time is over.
        """
        with self._place(ask):
            pauses = _Pauses(deadline)
            while pauses.left > 0:
                response, last = self.streams.stream.remote(ask, stamp.vlm, deadline), None
                try:
                    while True:
                        async with asyncio.timeout(pauses.left):
                            piece = _value(await anext(response, None), stamp)
                        if piece is None:
                            break
                        last = piece
                        yield piece
                    if last is not None and last.finish:
                        return
                    raise EOFError("the stream ended too early")
                except BackPressureError:
                    raise _overloaded() from None
                except TimeoutError:
                    break
                except (InvalidRequest, DeadlineExceeded, Unavailable):
                    raise
                except Exception as error:
                    if last is not None:
                        raise Unavailable(
                            f"the answer broke off ({type(error).__name__}).", "Ask again; nothing was kept."
                        ) from None
                    await pauses.after(error)
                finally:
                    response.cancel()
            raise pauses.end()

    async def _one(self, call: Callable[[], Any], stamp: ReleaseSnapshot, deadline: float) -> Any:
        pauses = _Pauses(deadline)
        while pauses.left > 0:
            response = call()
            try:
                async with asyncio.timeout(pauses.left):
                    answer = await response
            except BackPressureError:
                raise _overloaded() from None
            except TimeoutError:
                response.cancel()
                break
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                await pauses.after(error)
                continue
            return _value(answer, stamp)
        raise pauses.end()

    @contextmanager
    def _place(self, ask: GenerationRequest) -> Iterator[None]:
        if self.running >= self.limit and ask is not PROBE:
            raise _overloaded()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1


class _Pauses:
    """Time left, growing pauses between tries, and what went wrong last."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.pause = 0.02
        self.trouble = ""

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    async def after(self, error: Exception) -> None:
        self.trouble = f"{type(error).__name__}: {str(error)[:200]}"
        await asyncio.sleep(max(0.0, min(self.pause, self.left)))
        self.pause = min(self.pause * 2, 0.5)

    def end(self) -> DeadlineExceeded | Unavailable:
        if self.trouble:
            return Unavailable(f"no VLM answered before the deadline ({self.trouble}).", "Try again shortly.")
        return DeadlineExceeded(
            "the deadline passed before the answer was ready.", "Ask for fewer tokens, or try again later."
        )


def _value(answer: Any, stamp: ReleaseSnapshot) -> Any:
    if not isinstance(answer, Refusal):
        return answer
    if answer.code == "ask":
        raise InvalidRequest(answer.message, answer.fix)
    if answer.code == "late":
        raise DeadlineExceeded(answer.message, answer.fix)
    raise AdapterUnservable(f"{stamp.vlm_adapter} cannot be served: {answer.message}", "An operator must look at it.")


def _overloaded() -> QueueFull:
    return QueueFull("the queue is full.", "Send the request again after the time in Retry-After.")
