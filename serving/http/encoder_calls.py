"""Calls to encoder replicas that survive the death of one.

Encoding is idempotent, so a call whose replica died is made again on another one. Replicas answer expected failures as
values (:class:`EncodeResult`); whatever is *raised* is the transport or a dead replica. Heads of an adapter are fetched
once and kept.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.serve.handle import DeploymentHandle

from serving.engines.heads import Answers, Head
from serving.errors import AdapterUnservable, Unavailable, WrongSpace
from serving.http.errors import ApiError
from serving.messages import IMAGE_COST, TEXT_COST, EncodeResult, HeadsResult, Modality, joined
from serving.own_threads import OwnThreads
from serving.ray.replica_calls import Attempts, call_another
from serving.releases.shadow_traffic import ShadowTraffic
from serving.releases.types import ReleaseSnapshot

_ADAPTERS = 8
"""Whose heads are kept: those of the resident releases, a few more than one."""
_THREADS = 2


class EncoderCalls:
    """Cuts a request into items that fit a batch, and gathers the vectors again.

    Args:
        max_batch: most images of a batch.
        shadow_traffic: what was encoded is offered to it.
    """

    def __init__(self, handle: DeploymentHandle, max_batch: int, shadow_traffic: ShadowTraffic | None = None) -> None:
        self.handle = handle
        self.shadow_traffic = shadow_traffic
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
        result = await self._in_chunks(kind, payload, snapshot, deadline, caller)
        if self.shadow_traffic is not None and self.shadow_traffic.watching:
            self.shadow_traffic.clip(kind, payload)
        return result

    async def heads(self, snapshot: ReleaseSnapshot, deadline: float) -> Mapping[str, Head]:
        """The heads of the snapshot's adapter, by name. Raises QueueFull, DeadlineExceeded, Unavailable."""
        attempts = Attempts(deadline - time.monotonic(), "encoder", "Try again later.")
        call = lambda: self.handle.heads.remote(snapshot.clip)  # noqa: E731
        result: HeadsResult = await call_another(call, attempts, lambda result: result.error or None)
        if result.error:
            raise _unservable(snapshot, result.error)
        return result.heads

    async def _in_chunks(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str
    ) -> EncodeResult:
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

    async def _one(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str
    ) -> EncodeResult:
        attempts = Attempts(deadline - time.monotonic(), "encoder", "Send fewer items, or try again later.")
        call = lambda: self.handle.encode.remote(kind, payload, snapshot.clip, caller, attempts.left)  # noqa: E731
        space = snapshot.image_space if kind == "image" else snapshot.text_space

        def refusal(result: EncodeResult) -> str | None:
            return result.error if result.code in ("adapter", "failed") or _strays(result, kind, space) else None

        result: EncodeResult = await call_another(call, attempts, refusal)
        if result.code == "late":
            raise attempts.over()
        if result.code == "failed":
            raise Unavailable(f"the forward pass failed ({result.error}).", "Try again; look at the encoders' log.")
        if result.code:
            raise _unservable(snapshot, result.error)
        if _strays(result, kind, space):
            raise WrongSpace(result.space(kind), space)
        return result


def _strays(result: EncodeResult, kind: Modality, space: str) -> bool:
    """Whether the vectors are of another embedding space than the request's release has."""
    return not result.code and result.space(kind) != space


def _unservable(snapshot: ReleaseSnapshot, error: str) -> AdapterUnservable:
    return AdapterUnservable(f"{snapshot.adapter} cannot be served: {error}.", "An operator must look at it.")


class ReleaseHeads:
    """Used from one event loop. An adapter never changes, so what was fetched once is right for as long as it is
    named."""

    def __init__(self, calls: EncoderCalls) -> None:
        self.calls = calls
        self._threads = OwnThreads("heads", _THREADS)
        self._kept: OrderedDict[str | None, Mapping[str, Head]] = OrderedDict()

    async def find(self, name: str, snapshot: ReleaseSnapshot, deadline: float) -> Head:
        """A head of the snapshot's adapter.

        Raises:
            ApiError: the release has none of this name; it says which it has.
            QueueFull, DeadlineExceeded, Unavailable.
        """
        heads = self._kept.get(snapshot.clip)
        if heads is None:
            heads = await self.calls.heads(snapshot, deadline)
            self._kept[snapshot.clip] = heads
            while len(self._kept) > _ADAPTERS:
                self._kept.popitem(last=False)
        if name not in heads:
            there = (
                f"It has {', '.join(sorted(heads))}." if heads else "It has none: see updater.heads in the settings."
            )
            raise ApiError(
                404, f"head: release {snapshot.release} has no head {name!r}. {there}", param="head", code="no_head"
            )
        self._kept.move_to_end(snapshot.clip)
        return heads[name]

    async def classify(self, head: Head, vectors: npt.NDArray[np.float32]) -> Answers:
        """See :meth:`Head.classify`; in a thread."""
        return await self._threads.run(head.classify, vectors)
