"""Shadow traffic: a sample of what clients send is also answered by the watched release and by its incumbent.

One comparison runs at a time, at low priority, and rests afterwards for as long as it took. What finds no place in the
short queue is dropped, so a busy server compares less and serves all the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from core import metrics
from core.errors import RatchetError
from core.ledger.rows import Family, ReleaseRow
from core.settings.serving import Rollout
from serving.engines.vlm.generation import GenerationRequest, GenerationResult
from serving.errors import AdapterUnservable
from serving.messages import EncodeResult, Modality
from serving.releases.agreement import Neighbours, same_answer
from serving.releases.guard import GuardTarget
from serving.releases.observations import ComparisonCounts, Observations, RequestCounts
from serving.releases.release_snapshot import ReleaseSnapshot

log = logging.getLogger("ratchet.rollout")
WAITING = 8
"""Comparisons that may wait. One at a time, these are seconds; more would be old when it is their turn."""
ITEMS = 4
"""Of one request: what encoders take in one piece between the batches of clients."""
ANSWER_TOKENS = 16
"""Of a VLM's answer: later tokens follow from the first ones, and cost as much again."""
REMEMBERED = 20_000
"""Inputs that are known to be compared already: the same one again is no new evidence."""
Encode = Callable[[Modality, Any, str | None], Awaitable[EncodeResult]]
"""Items at low priority under an adapter."""


class Vlms(Protocol):
    """The part of :class:`serving.http.calls.VlmCalls` that is needed here."""

    async def reply(self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """The whole answer."""

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """Log-probability of each choice as the whole answer."""


class _Dropped(Exception):
    """One side gave no answer, and that says nothing about its release."""


@dataclass
class _Watch:
    target: GuardTarget
    compared: dict[Family, ComparisonCounts]
    neighbours: Neighbours = field(default_factory=Neighbours)
    fixed: bool = False
    seen: dict[bytes, None] = field(default_factory=dict)
    turn: int = 0

    def is_new(self, key: bytes) -> bool:
        """Whether this input was not compared yet; it counts as compared from now on."""
        if key in self.seen:
            return False
        self.seen[key] = None
        if len(self.seen) > REMEMBERED:
            del self.seen[next(iter(self.seen))]
        return True


class ShadowTraffic:
    """Of one ingress; used from one event loop. :meth:`run` must run for anything to be compared."""

    def __init__(
        self, settings: Rollout, encode: Encode, tokens: Sequence[list[int]], vlms: Vlms | None, seconds: float
    ) -> None:
        """``tokens``: those of :data:`agreement.TEXTS`; ``seconds``: the longest that a VLM's answer may take."""
        self.settings = settings
        self._encode = encode
        self._tokens = list(tokens)
        self._vlms = vlms
        self._seconds = seconds
        self._watch: _Watch | None = None
        self._jobs: asyncio.Queue[tuple[_Watch, Family, Any]] = asyncio.Queue(WAITING)
        self.watching = False
        """Whether inputs are wanted: the one thing that a request has to look at."""

    def watch(self, target: GuardTarget | None) -> None:
        """Compare for this release from now on; the same one again changes nothing. None: for none."""
        if target is None:
            self._watch, self.watching = None, False
        elif self._watch is None or self._watch.target.release.number != target.release.number:
            families: tuple[Family, ...] = ("clip", "vlm")
            self._watch = _Watch(target, {family: ComparisonCounts() for family in families if target.differs(family)})
            self.watching = self.settings.compare_share > 0

    def clip(self, kind: Modality, payload: Any) -> None:
        """Items that a client had encoded: pixels, or token ids."""
        self._offer("clip", (kind, payload[:ITEMS]))

    def vlm(self, request: GenerationRequest) -> None:
        """What a client asked."""
        self._offer("vlm", request)

    def observations(self, answered: dict[int, RequestCounts]) -> Observations:
        """What was seen so far, with the requests by release that the admission counted."""
        watch = self._watch
        if watch is None:
            return Observations(0, answered)
        return Observations(watch.target.release.number, answered, dict(watch.compared))

    async def run(self) -> None:
        """Compare for ever."""
        while True:
            watch, family, inputs = await self._jobs.get()
            began = time.monotonic()
            try:
                if watch is self._watch:
                    await (self._clip(watch, *inputs) if family == "clip" else self._vlm(watch, inputs))
            except _Dropped:
                self._drop(watch, family)
            except Exception as error:  # replicas that come and go; nobody waits for this
                log.info("a comparison failed: %s: %s", type(error).__name__, error)
                self._drop(watch, family)
            await asyncio.sleep(time.monotonic() - began)

    def _offer(self, family: Family, inputs: Any) -> None:
        watch = self._watch
        if watch is None or family not in watch.compared or random.random() >= self.settings.compare_share:  # noqa: S311
            return
        if time.time() >= watch.target.until:
            self.watch(None)
            return
        try:
            self._jobs.put_nowait((watch, family, inputs))
        except asyncio.QueueFull:
            self._drop(watch, family)

    def _drop(self, watch: _Watch, family: Family) -> None:
        watch.compared[family].dropped += 1
        metrics.rollout.compared(family, "dropped")

    async def _clip(self, watch: _Watch, kind: Modality, payload: Any) -> None:
        if not watch.fixed:
            fixed = await self._both(watch, "clip", lambda row: self._vectors("text", self._tokens, row))
            if fixed is None:
                return
            watch.neighbours.fix(*fixed)
            watch.fixed = True
        fresh = [item for item in payload if watch.is_new(_digest(kind, item))]
        if not fresh:
            return
        items: Any = np.stack(fresh) if kind == "image" else fresh
        both = await self._both(watch, "clip", lambda row: self._vectors(kind, items, row))
        for ours, theirs in zip(*both, strict=True) if both is not None else ():
            self._count_agreement(watch, "clip", watch.neighbours.judge(kind, ours, theirs))

    async def _vlm(self, watch: _Watch, sent: GenerationRequest) -> None:
        if not watch.is_new(await asyncio.to_thread(_digest_request, sent)):
            return
        short = min(sent.max_tokens, ANSWER_TOKENS)
        request = replace(sent, max_tokens=short, temperature=0.0, top_p=1.0, seed=None)
        both = await self._both(watch, "vlm", lambda row: self._reply(request, row))
        if both is None:
            return
        ours, theirs = (result.text for result in both)
        if ours.strip() != theirs.strip() and theirs.strip():
            scores = [await self._score(request, theirs, row) for row in (watch.target.release, watch.target.incumbent)]
        else:
            scores = [0.0, 0.0 if ours.strip() == theirs.strip() else float("nan")]
        self._count_agreement(watch, "vlm", same_answer(theirs, ours, scores[1], scores[0], len(both[1].tokens)))

    async def _both(self, watch: _Watch, family: Family, call: Callable[[ReleaseRow], Awaitable[Any]]) -> Any:
        """What both releases answer, the watched one first; None when one of them cannot.

        They are called first by turns: the second call may be faster, and neither release must gain by it.
        """
        watch.turn += 1
        compared, rows = watch.compared[family], (watch.target.release, watch.target.incumbent)
        answers: dict[int, Any] = {}
        took: dict[int, float] = {}
        failed: set[int] = set()
        for row in rows if watch.turn % 2 else rows[::-1]:
            began = time.perf_counter()
            try:
                answers[row.number] = await call(row)
            except AdapterUnservable:
                failed.add(row.number)
            took[row.number] = time.perf_counter() - began
        compared.tried += 1
        compared.failed += rows[0].number in failed
        compared.incumbent_failed += rows[1].number in failed
        if failed:
            metrics.rollout.compared(family, "failed")
            return None
        compared.timed += 1
        compared.slower += took[rows[0].number] > self.settings.max_latency_ratio * took[rows[1].number]
        return answers[rows[0].number], answers[rows[1].number]

    def _count_agreement(self, watch: _Watch, family: Family, agreed: bool | None) -> None:
        if agreed is None:
            return
        watch.compared[family].inputs += 1
        watch.compared[family].agreed += agreed
        metrics.rollout.compared(family, "agree" if agreed else "differ")

    async def _vectors(self, kind: Modality, items: Any, row: ReleaseRow) -> Any:
        answer = await self._encode(kind, items, row.clip)
        if answer.code == "adapter":
            raise AdapterUnservable(answer.error)
        if answer.vectors is None:
            raise _Dropped
        return answer.vectors

    async def _reply(self, request: GenerationRequest, row: ReleaseRow) -> GenerationResult:
        reply: GenerationResult = await self._call_vlm(
            lambda vlms, snapshot, deadline: vlms.reply(request, snapshot, deadline), row
        )
        return reply

    async def _score(self, request: GenerationRequest, answer: str, row: ReleaseRow) -> float:
        (score,) = await self._call_vlm(
            lambda vlms, snapshot, deadline: vlms.score(request, (answer,), snapshot, deadline), row
        )
        return float(score)

    async def _call_vlm(self, call: Callable[[Vlms, ReleaseSnapshot, float], Awaitable[Any]], row: ReleaseRow) -> Any:
        if self._vlms is None:
            raise _Dropped
        try:
            return await call(
                self._vlms, ReleaseSnapshot(row.number, row.clip, "", "", row.vlm), time.monotonic() + self._seconds
            )
        except AdapterUnservable:
            raise
        except RatchetError:  # too busy, too late, no replica
            raise _Dropped from None


def _digest(kind: Modality, item: Any) -> bytes:
    digest = hashlib.sha256(kind.encode())
    digest.update(np.ascontiguousarray(item).data)
    return digest.digest()


def _digest_request(request: GenerationRequest) -> bytes:
    digest = hashlib.sha256(repr(request.messages).encode("utf-8", "surrogatepass"))
    for image in request.images:
        digest.update(repr(image.shape).encode())
        with suppress(ValueError):  # of an empty image nothing is left to add
            digest.update(np.ascontiguousarray(image).data)
    return digest.digest()
