"""Calls to encoder replicas that survive the death of one.

Encoding is idempotent, so a call whose replica died is made again on another one. Replicas answer expected failures as
values (:class:`EncodeResult`); whatever is *raised* is the transport or a dead replica.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from ray.serve.handle import DeploymentHandle

from serving.errors import AdapterUnservable, Unavailable, WrongSpace
from serving.messages import IMAGE_COST, TEXT_COST, EncodeResult, HeadsResult, Modality, joined
from serving.ray.replica_calls import Attempts, call_replica
from serving.releases.release_snapshot import ReleaseSnapshot

OTHER_TRIES: Final = 2
"""After a replica that cannot load the adapter, or whose forward pass failed: another one may do better."""


class EncoderCalls:
    """Cuts a request into items that fit a batch, and gathers the vectors again.

    Args:
        max_batch: most images of a batch.
    """

    def __init__(self, handle: DeploymentHandle, max_batch: int) -> None:
        self.handle = handle
        self.budget = max_batch * IMAGE_COST

    async def encode(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str = ""
    ) -> EncodeResult:
        """Vectors of all items (uint8 [n, S, S, 3], or n lists of token ids), every one by the snapshot's adapter.

        Args:
            deadline: on the monotonic clock.
            caller: whose turn they take.

        Raises:
            QueueFull, DeadlineExceeded, Unavailable.
        """
        step = max(1, self.budget // (IMAGE_COST if kind == "image" else TEXT_COST))
        chunks = [payload[start : start + step] for start in range(0, len(payload), step)]
        if len(chunks) == 1:
            return await self._one(kind, chunks[0], snapshot, deadline, caller)
        tasks = [asyncio.ensure_future(self._one(kind, chunk, snapshot, deadline, caller)) for chunk in chunks]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return joined(answers)

    async def heads(self, snapshot: ReleaseSnapshot, deadline: float) -> Mapping[str, Any]:
        """The heads of the snapshot's adapter, by name. Raises QueueFull, DeadlineExceeded, Unavailable."""
        attempts = Attempts(deadline - time.monotonic(), "encoder", "Try again later.")
        call = lambda: self.handle.heads.remote(snapshot.clip)  # noqa: E731
        result: HeadsResult = await _tried(call, attempts, lambda result: bool(result.error))
        if result.error:
            raise _unservable(snapshot, result.error)
        return result.heads

    async def _one(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str
    ) -> EncodeResult:
        attempts = Attempts(deadline - time.monotonic(), "encoder", "Send fewer items, or try again later.")
        call = lambda: self.handle.encode.remote(kind, payload, snapshot.clip, caller, attempts.left)  # noqa: E731
        space = snapshot.image_space if kind == "image" else snapshot.text_space
        result: EncodeResult = await _tried(
            call, attempts, lambda result: result.code in ("adapter", "failed") or _strays(result, kind, space)
        )
        if result.code == "late":
            raise attempts.over()
        if result.code == "failed":
            raise Unavailable(f"the forward pass failed ({result.error}).", "Try again; look at the encoders' log.")
        if result.code:
            raise _unservable(snapshot, result.error)
        if _strays(result, kind, space):
            raise WrongSpace(result.space(kind), space)
        return result


async def _tried(call: Callable[[], Any], attempts: Attempts, refused: Callable[[Any], bool]) -> Any:
    """What a replica answers; a few others are asked where one refuses."""
    result = await call_replica(call, attempts)
    for _ in range(OTHER_TRIES):
        if not refused(result):
            break
        await attempts.failed(result.error)
        result = await call_replica(call, attempts)
    return result


def _strays(result: EncodeResult, kind: Modality, space: str) -> bool:
    """Whether the vectors are of another embedding space than the request's release has."""
    return not result.code and result.space(kind) != space


def _unservable(snapshot: ReleaseSnapshot, error: str) -> AdapterUnservable:
    return AdapterUnservable(f"{snapshot.adapter} cannot be served: {error}.", "An operator must look at it.")
