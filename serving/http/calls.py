"""Calls to the VLM, the catalog and the release controller that survive the death of a replica. Answers have no side
effects, so a failed call is repeated on another replica; a stream only before its first chunk. Encoders are called in
:mod:`serving.http.clip_vectors`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from core import metrics
from core.errors import RatchetError, ReleaseConflict, StoreError
from serving.catalog.queries import Found, Search
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.errors import AdapterUnservable, DeadlineExceeded, InvalidRequest, Unavailable
from serving.messages import Refusal
from serving.own_threads import OwnThreads
from serving.ray.deployment_status import DeploymentStatus
from serving.ray.replica_calls import Attempts, call_another, call_replica, queue_full
from serving.releases.controller import outcome_of
from serving.releases.types import HoldingCommand, LiveCommand, ReleaseResult, ReleaseSnapshot, RollbackCommand

CONTROLLER_SECONDS: Final = 20.0
"""Longest time to retry a call when controllers die, and longest silence of a controller."""
LOOK: Final = "Look at what is live (`ratchet releases list`), and ask again."
log = logging.getLogger("ratchet.ingress")
LOOK_SECONDS: Final = 1.0
FIRST_LOOK_SECONDS: Final = 2.0
"""For the first look, which a process's first request waits for."""
STATUS_SECONDS: Final = 30.0
STARTING: Final = "the VLM is starting"


@dataclass
class ControllerCalls:
    """Calls to the release controller. Raises the expected errors that it returns as values."""

    handle: DeploymentHandle

    async def change(self, command: LiveCommand) -> ReleaseResult:
        with metrics.operator.action(command.action):
            return outcome_of(await self._change(command))

    async def _change(self, command: LiveCommand) -> ReleaseResult | RatchetError:
        """If a controller dies during a rollback, call another one: ``expected_live`` prevents going back twice."""
        attempts, died = Attempts(CONTROLLER_SECONDS, "release controller"), False
        while attempts.left > 0:
            try:
                result: ReleaseResult | RatchetError = await self._answered(self.handle.change.remote(command))
            except BackPressureError:
                raise queue_full() from None
            except RayActorError as error:
                if not isinstance(command, RollbackCommand):
                    raise Unavailable("the release controller ended during the call.", LOOK) from None
                died = True
                await attempts.failed(error)
                continue
            if died and isinstance(result, ReleaseConflict):
                raise Unavailable(f"the release controller ended during the call, and now {result.message}", LOOK)
            return result
        raise attempts.over()

    async def _answered(self, response: Any) -> Any:
        """The result of a call, which may take hours while the controller answers others. Raises Unavailable if not."""

        async def answer() -> Any:
            return await response

        task = asyncio.ensure_future(answer())
        try:
            while not (await asyncio.wait([task], timeout=CONTROLLER_SECONDS))[0]:
                try:
                    await self.status()
                except DeadlineExceeded:
                    raise Unavailable(
                        f"the release controller has not answered for {CONTROLLER_SECONDS:g} s.", LOOK
                    ) from None
                except RatchetError:
                    continue  # it answers, or is replaced: then the call ends
            return task.result()
        finally:
            task.cancel()

    async def hold(self, command: HoldingCommand) -> None:
        with metrics.operator.action(command.action):
            outcome_of(await self._asked_again(lambda: self.handle.hold.remote(command)))

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._asked_again(self.handle.status.remote)
        return status

    async def _asked_again(self, call: Callable[[], Any]) -> Any:
        return await call_replica(call, Attempts(CONTROLLER_SECONDS, "release controller"))


@dataclass
class CatalogCalls:
    """Reads of the catalog, repeated when its replica is replaced."""

    handle: DeploymentHandle
    timeout_seconds: float

    async def search(self, space: str, search: Search) -> Found:
        """The nearest samples to each query. Raises StoreError, Unavailable."""
        found: Found = await self._call(lambda: self.handle.search.remote(space, search))
        return found

    async def image(self, sample_id: str) -> bytes | None:
        """An encoded image, or None. Raises StoreError, Unavailable."""
        image: bytes | None = await self._call(lambda: self.handle.image.remote(sample_id))
        return image

    async def status(self) -> dict[str, Any]:
        status: dict[str, Any] = await self._call(self.handle.status.remote)
        return status

    async def _call(self, call: Callable[[], Any]) -> Any:
        answer = await call_replica(call, Attempts(self.timeout_seconds, "catalog"), retry_full=True)
        if isinstance(answer, str):  # why the store could not be read
            raise StoreError(answer)
        return answer


class VlmCalls:
    """Calls to VLM replicas under the snapshot's adapter; bounds the requests that wait or run. Refuse requests with
    :attr:`start_problem` until :meth:`wait_started` has seen a first replica. Later, while a replica is replaced,
    requests wait for the next one within their deadline."""

    def __init__(
        self, handle: DeploymentHandle, limit: int, read_status: Callable[[], DeploymentStatus | None] = lambda: None
    ) -> None:
        """``read_status``: Serve's status of the VLM's deployment; called in a thread."""
        self.handle = handle
        self.streams = handle.options(stream=True)
        self.limit = limit
        self.running = 0
        self._read_status = read_status
        self._thread = OwnThreads("vlm-status")
        self._cause = ""
        self._started = False

    async def reply(self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """The whole answer. ``deadline``: on the monotonic clock. Raises InvalidRequest, QueueFull, DeadlineExceeded,
        Unavailable."""
        with self._place():
            call = partial(self.handle.reply.remote, request)
            result: GenerationResult = await _ask(call, snapshot, deadline)
            return result

    async def probe(self, snapshot: ReleaseSnapshot, deadline: float) -> None:
        """Have a replica generate a token, bypassing the queue. Raises as :meth:`reply`, QueueFull if it is busy."""
        await _ask(self.handle.probe.remote, snapshot, deadline)

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """Log-probability of each choice as the whole answer. Raises as :meth:`reply`."""
        with self._place():
            call = partial(self.handle.score.remote, request, tuple(choices))
            scores: list[float] = await _ask(call, snapshot, deadline)
            return scores

    async def stream(
        self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float
    ) -> AsyncIterator[TokenChunk]:
        """The answer chunk by chunk; the last one has a ``finish``. Closing it aborts the request. Raises as
        :meth:`reply`: before the first chunk, or later when the replica died or the time is over."""
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

    @property
    def start_problem(self) -> str:
        """Reason that requests cannot be answered yet; empty once the VLM has started."""
        if self._started:
            return ""
        return f"{STARTING} again, after it failed: {self._cause}" if self._cause else f"{STARTING}."

    async def look(self, seconds: float = FIRST_LOOK_SECONDS) -> None:
        try:
            async with asyncio.timeout(seconds):
                status = await self._thread.run(self._read_status)
        except Exception as error:  # Serve's controller is busy, or restarts
            log.info("no status of the VLM: %s: %s", type(error).__name__, error)
            return
        if status is None:
            return
        if status.cause and status.cause != self._cause:
            log.error("the VLM cannot start, and is tried again: %s", status.cause)
        self._cause = status.cause or self._cause
        self._started = self._started or status.running > 0

    async def wait_started(self) -> None:
        began = time.monotonic()
        while not self._started:
            await self.look(STATUS_SECONDS)
            await asyncio.sleep(0 if self._started else LOOK_SECONDS)
        log.warning("the VLM answers after %.0f s", time.monotonic() - began)

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


async def _ask(call: Callable[[str | None, float], Any], snapshot: ReleaseSnapshot, deadline: float) -> Any:
    """``call``: gets the adapter, and the seconds that are left."""
    attempts = _attempts(deadline)

    def refusal(answer: Any) -> str | None:
        return answer.message if isinstance(answer, Refusal) and answer.code == "adapter" else None

    return _value(await call_another(lambda: call(snapshot.vlm, attempts.left), attempts, refusal), snapshot)


def _value(answer: Any, snapshot: ReleaseSnapshot) -> Any:
    if not isinstance(answer, Refusal):
        return answer
    if answer.code == "ask":
        raise InvalidRequest(answer.message, answer.fix, answer.param)
    if answer.code == "busy":
        raise queue_full()
    if answer.code == "late":
        raise DeadlineExceeded(answer.message, answer.fix)
    raise AdapterUnservable(
        f"{snapshot.vlm_adapter} cannot be served: {answer.message}", "An operator must look at it."
    )
