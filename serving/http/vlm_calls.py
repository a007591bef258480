"""Calls to VLM replicas that survive the death of one, and whether the VLM has come up.

An answer has no side effect, so a call whose replica died is made again on another one. A stream is asked again only
before its first chunk: what a client has seen cannot be taken back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, Unavailable
from serving.messages import Refusal
from serving.ray.deployment_status import DeploymentStatus
from serving.ray.replica_calls import Attempts, call_another, queue_full
from serving.releases.shadow_traffic import ShadowTraffic
from serving.releases.types import ReleaseSnapshot

log = logging.getLogger("ratchet.ingress")
LOOK_SECONDS: Final = 1.0
FIRST_LOOK_SECONDS: Final = 2.0
"""For the first look, which a process's first request waits for."""
STARTING: Final = "the VLM is starting"


class VlmCalls:
    """Calls to VLM replicas; bounds the requests that wait or run. All are answered by the snapshot's VLM adapter."""

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
    def refusal(answer: Any) -> str | None:
        return answer.message if isinstance(answer, Refusal) and answer.code == "adapter" else None

    return _value(await call_another(call, attempts, refusal), snapshot)


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


class MirroredVlms:
    """The calls of clients: what they ask is offered to :class:`ShadowTraffic` too."""

    def __init__(self, calls: VlmCalls, shadow_traffic: ShadowTraffic, start: VlmStart) -> None:
        self.calls = calls
        self.shadow_traffic = shadow_traffic
        self.start = start

    @property
    def start_problem(self) -> str:
        """See :attr:`VlmStart.problem`."""
        return self.start.problem

    async def reply(self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """See :meth:`VlmCalls.reply`."""
        reply = await self.calls.reply(request, snapshot, deadline)
        self._offer(request)
        return reply

    async def probe(self, snapshot: ReleaseSnapshot, deadline: float) -> None:
        """See :meth:`VlmCalls.probe`."""
        await self.calls.probe(snapshot, deadline)

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """See :meth:`VlmCalls.score`."""
        scores = await self.calls.score(request, choices, snapshot, deadline)
        self._offer(request)
        return scores

    def stream(
        self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float
    ) -> AsyncIterator[TokenChunk]:
        """See :meth:`VlmCalls.stream`: its own iterator, so that a chunk costs nothing more."""
        self._offer(request)
        return self.calls.stream(request, snapshot, deadline)

    def _offer(self, request: GenerationRequest) -> None:
        if self.shadow_traffic.watching:
            self.shadow_traffic.vlm(request)


class VlmStart:
    """Waits for the first answer of any VLM replica. Use from one event loop.

    Later the VLM counts as started, also while a replica is replaced: a request waits for the next one then, within its
    deadline, as it does for an encoder.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[object]], read_status: Callable[[], DeploymentStatus | None]
    ) -> None:
        """Args:
        ask: a call that is answered once a replica runs.
        read_status: what Serve knows of the VLM's deployment; called in a thread.
        """
        self._ask = ask
        self._read_status = read_status
        self._cause = ""
        self.started = False

    @property
    def problem(self) -> str:
        """Why requests cannot be answered yet; empty once the VLM has started."""
        if self.started:
            return ""
        return f"{STARTING} again, after it failed: {self._cause}" if self._cause else f"{STARTING}."

    async def look(self) -> None:
        """Find out from Serve whether a replica runs, as when this process takes the place of another one."""
        try:
            async with asyncio.timeout(FIRST_LOOK_SECONDS):
                await self._look()
        except TimeoutError:
            log.info("no status of the VLM within %s s", FIRST_LOOK_SECONDS)

    async def run(self) -> None:
        """Return when a replica has answered, or runs by what Serve says."""
        if self.started:
            return
        began = time.monotonic()
        answer = asyncio.ensure_future(self._answered())
        try:
            while not (answer.done() or self.started):
                await self._look()
                await asyncio.wait({answer}, timeout=LOOK_SECONDS)
        finally:
            answer.cancel()
        self.started = True
        log.warning("the VLM answers after %.0f s", time.monotonic() - began)

    async def _answered(self) -> None:
        while True:
            try:
                await self._ask()
                return
            except Exception as error:  # the replica died as it was asked
                log.info("the VLM has not started yet: %s: %s", type(error).__name__, error)
                await asyncio.sleep(LOOK_SECONDS)

    async def _look(self) -> None:
        try:
            status = await asyncio.to_thread(self._read_status)
        except Exception as error:  # Serve's controller restarts
            log.info("no status of the VLM: %s: %s", type(error).__name__, error)
            return
        if status is None:
            return
        if status.cause and status.cause != self._cause:
            log.error("the VLM cannot start, and is tried again: %s", status.cause)
        self._cause = status.cause or self._cause
        self.started = self.started or status.running > 0
