"""Calls through Ray handles with a deadline. A call whose replica died is repeated with growing pauses, so every method
that is called this way may run twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from core.errors import ReleaseError
from serving.errors import DeadlineExceeded, QueueFull, Unavailable

FIRST_PAUSE_SECONDS: Final = 0.02
LONGEST_PAUSE_SECONDS: Final = 0.5
OTHER_TRIES: Final = 2
"""Other replicas to try after one that cannot load the adapter, or whose forward pass failed."""


class Attempts:
    """The attempts of one call: time left, pauses that double, and the last failure."""

    def __init__(self, seconds: float, replica: str, fix: str = "Try again later.") -> None:
        """``replica``: its kind, for messages. ``fix``: advice to clients when the deadline has passed."""
        self._end = time.monotonic() + seconds
        self._pause = FIRST_PAUSE_SECONDS
        self._replica = replica
        self._fix = fix
        self.last_error = ""

    @property
    def left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self._end - time.monotonic()

    async def failed(self, error: BaseException | str) -> None:
        """Remember why an attempt failed, and pause before the next one."""
        self.last_error = error if isinstance(error, str) else f"{type(error).__name__}: {str(error)[:200]}"
        await asyncio.sleep(max(0.0, min(self._pause, self.left)))
        self._pause = min(self._pause * 2, LONGEST_PAUSE_SECONDS)

    def over(self) -> DeadlineExceeded | Unavailable:
        if self.last_error:
            return Unavailable(
                f"no {self._replica} answered before the deadline ({self.last_error}).", "Try again shortly."
            )
        return DeadlineExceeded("the deadline passed before the answer was ready.", self._fix)


async def call_replica(call: Callable[[], Any], attempts: Attempts, retry_full: bool = False) -> Any:
    """Call one replica and return its answer. ``call`` makes a new call through a handle; cancelling this cancels it.
    ``retry_full``: also try again when the queue is full. Raises QueueFull, DeadlineExceeded, Unavailable."""
    while attempts.left > 0:
        response = call()
        try:
            async with asyncio.timeout(attempts.left):
                return await response
        except TimeoutError:
            response.cancel()
            break
        except asyncio.CancelledError:
            response.cancel()
            raise
        except Exception as error:
            if isinstance(error, BackPressureError) and not retry_full:
                raise queue_full() from None
            await attempts.failed(error)
    raise attempts.over()


async def call_another(call: Callable[[], Any], attempts: Attempts, refusal: Callable[[Any], str | None]) -> Any:
    """Call one replica and return its answer; where it refuses, try a few others. ``refusal``: the error of an answer
    that another replica may not give, else None. Raises as :func:`call_replica`."""
    answer = await call_replica(call, attempts)
    for _ in range(OTHER_TRIES):
        why = refusal(answer)
        if why is None:
            break
        await attempts.failed(why)
        answer = await call_replica(call, attempts)
    return answer


async def call_every_replica(handle: DeploymentHandle, method: str, *args: Any, seconds: float) -> list[Any]:
    """Call every running replica and return all answers. When one dies meanwhile, all are called again. Raises
    ReleaseError when no round succeeds in time."""
    attempts = Attempts(seconds, "replica")
    while attempts.left > 0:
        try:
            response = handle.broadcast(method, *args)
            async with asyncio.timeout(attempts.left):
                results = await response.results_async(return_exceptions=True)
        except TimeoutError:
            attempts.last_error = attempts.last_error or "no answer"
            break
        except Exception as error:  # no replica at this moment: Serve is starting one
            await attempts.failed(error)
            continue
        failed = [result for result in results if isinstance(result, BaseException)]
        if results and not failed:
            return list(results)
        await attempts.failed(failed[0] if failed else "no replica")
    raise ReleaseError(
        f"not every replica answered {method!r}: {attempts.last_error}.", "See `ratchet status`, then try again."
    )


def queue_full() -> QueueFull:
    return QueueFull("the queue is full.", "Send the request again after the time in Retry-After.")
