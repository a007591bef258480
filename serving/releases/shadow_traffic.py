"""Shadow traffic: the watched release and its incumbent both answer a sample of requests, and agreement is counted. One
comparison runs at a time, at low priority, and then rests as long as it took. Inputs that find no place in the short
queue are dropped, so a busy server compares less.

CLIPs: vectors of two releases are not comparable, so each release ranks the same references (a few fixed texts and the
newest inputs of clients) by similarity to an item: images against texts, texts against images.
VLMs agree when greedy answers are equal, or the new one finds the incumbent's answer about as likely as it does."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from core import metrics
from core.errors import RatchetError
from core.ledger.rows import Family, ReleaseRow
from core.settings.serving import Rollout
from serving.engines.vlm.generation import GenerationRequest, GenerationResult
from serving.errors import AdapterUnservable
from serving.messages import EncodeResult, Modality
from serving.releases.guard import SLOWER, ComparisonCounts, GuardTarget, Observations, RequestCounts
from serving.releases.types import FAMILIES, ReleaseSnapshot

log = logging.getLogger("ratchet.rollout")
WAITING = 8
"""Comparisons that may wait: at one at a time, seconds. With more, inputs would be old."""
ITEMS = 4
"""Of one request: what encoders take in one piece between the batches of clients."""
ANSWER_TOKENS = 16
"""Of a VLM's answer: later tokens follow from the first ones, and cost as much again."""
REMEMBERED = 20_000
"""Inputs known to be compared already: repeating one is no new evidence."""
Vector = npt.NDArray[np.float32]
REFERENCES = 64
"""Of each kind: the newest, in addition to the fixed texts."""
FEWEST = 8
"""With fewer references a rank correlation says little."""
SAME_ORDER = 0.5
"""Lowest Spearman correlation at which two orders count as the same."""
NATS_PER_TOKEN = 3.0
"""Nats per token by which the incumbent's answer may be less likely to the other VLM."""
TEXTS = (
    "a photo of a cat", "a dog", "a bird in the sky", "a fish", "a tree", "a red flower", "fruit on a plate",
    "a slice of cake", "a car", "a bicycle", "a ship at sea", "a house", "a map", "the flag of a country", "a book",
    "a musical instrument", "a smiling face", "a hand", "a person walking", "a child playing", "a ball", "a clock",
    "a key", "a sword", "a green monster", "a robot", "the moon", "rain and clouds", "a mountain", "a shoe",
    "a blue circle", "a yellow square",
)  # fmt: skip
"""Texts that images are ranked against from the start, all different things."""
Encode = Callable[[Modality, Any, str | None], Awaitable[EncodeResult]]
"""Encodes items at low priority under an adapter."""


class Neighbours:
    """Reference items with their vectors under both releases."""

    def __init__(self) -> None:
        self._fixed: list[tuple[Vector, Vector]] = []
        self._newest: dict[Modality, deque[tuple[Vector, Vector]]] = {
            "image": deque(maxlen=REFERENCES), "text": deque(maxlen=REFERENCES),
        }  # fmt: skip

    def fix(self, one: Vector, other: Vector) -> None:
        """Set the vectors [n, dim] of :data:`TEXTS`."""
        self._fixed = list(zip(one, other, strict=True))

    def judge(self, kind: Modality, one: Vector, other: Vector) -> bool | None:
        """True if both releases agree about an item, which then becomes a reference. None: too few references."""
        texts = [*self._fixed, *self._newest["text"]]
        images = list(self._newest["image"])
        near = texts if kind == "image" or len(images) < FEWEST else images
        self._newest[kind].append((one, other))
        if len(near) < FEWEST:
            return None
        return order(one, [pair[0] for pair in near], other, [pair[1] for pair in near]) >= SAME_ORDER


def order(one: Vector, ones: Sequence[Vector], other: Vector, others: Sequence[Vector]) -> float:
    """Spearman correlation of similarities to the same references under two releases; 0 if values are not finite, or
    all equal."""
    from scipy.stats import rankdata  # here, because importing takes a second and only trials need it

    first, second = np.stack(ones) @ one, np.stack(others) @ other
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return 0.0
    ranks = [rankdata(row) - (len(row) + 1) / 2 for row in (first, second)]
    size = math.sqrt(float(ranks[0] @ ranks[0]) * float(ranks[1] @ ranks[1]))
    return float(ranks[0] @ ranks[1]) / size if size else 0.0


def same_answer(incumbent: str, other: str, incumbent_score: float, other_score: float, tokens: int) -> bool:
    """True if two VLMs agree. The scores are the log-probabilities of the *incumbent's* answer, of ``tokens`` tokens,
    under each."""
    if incumbent.strip() == other.strip():
        return True
    if not (math.isfinite(incumbent_score) and math.isfinite(other_score)):
        return False
    return incumbent_score - other_score <= NATS_PER_TOKEN * max(1, tokens)


class Vlms(Protocol):
    """The part of :class:`serving.http.calls.VlmCalls` that is needed here."""

    async def reply(self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """The whole answer."""

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """Log-probability of each choice as the whole answer."""


class _Dropped(Exception):
    """One side gave no answer, for a reason that says nothing about its release."""


@dataclass
class _Watch:
    target: GuardTarget
    compared: dict[Family, ComparisonCounts]
    neighbours: Neighbours = field(default_factory=Neighbours)
    fixed: bool = False
    seen: dict[bytes, None] = field(default_factory=dict)
    turn: int = 0

    def is_new(self, key: bytes) -> bool:
        """True if this input was not compared yet; marks it as compared."""
        if key in self.seen:
            return False
        self.seen[key] = None
        if len(self.seen) > REMEMBERED:
            del self.seen[next(iter(self.seen))]
        return True


class ShadowTraffic:
    """Shadow traffic of one ingress. Use from one event loop, in which :meth:`run` must run."""

    def __init__(
        self, settings: Rollout, encode: Encode, tokens: Sequence[list[int]], vlms: Vlms | None, seconds: float
    ) -> None:
        """``tokens``: of :data:`TEXTS`; ``seconds``: longest time of a VLM's answer."""
        self.settings = settings
        self._encode = encode
        self._tokens = list(tokens)
        self._vlms = vlms
        self._seconds = seconds
        self._watch: _Watch | None = None
        self._jobs: asyncio.Queue[tuple[_Watch, Family, Any]] = asyncio.Queue(WAITING)
        self.watching = False
        """True if inputs are wanted: all that a request needs to check."""

    def watch(self, target: GuardTarget | None) -> None:
        """Compare for this release from now on, or for none. The same one again changes nothing."""
        if target is None:
            self._watch, self.watching = None, False
        elif self._watch is None or self._watch.target.release.number != target.release.number:
            self._watch = _Watch(target, {family: ComparisonCounts() for family in FAMILIES if target.differs(family)})
            self.watching = self.settings.compare_share > 0

    def clip(self, kind: Modality, payload: Any) -> None:
        """Offer items that a client had encoded: pixels, or token IDs."""
        self._offer("clip", (kind, payload[:ITEMS]))

    def vlm(self, request: GenerationRequest) -> None:
        self._offer("vlm", request)

    def observations(self, answered: dict[int, RequestCounts]) -> Observations:
        watch = self._watch
        if watch is None:
            return Observations(0, answered)
        return Observations(watch.target.release.number, answered, dict(watch.compared))

    async def run(self) -> None:
        while True:
            watch, family, inputs = await self._jobs.get()
            began = time.monotonic()
            try:
                if watch is self._watch:
                    await (self._clip(watch, *inputs) if family == "clip" else self._vlm(watch, inputs))
            except _Dropped:
                self._drop(watch, family)
            except Exception as error:  # replicas that come and go; no client waits for this
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
        scores = [math.nan, math.nan]
        if theirs.strip() and ours.strip() != theirs.strip():
            scores = [await self._score(request, theirs, row) for row in (watch.target.release, watch.target.incumbent)]
        self._count_agreement(watch, "vlm", same_answer(theirs, ours, scores[1], scores[0], len(both[1].tokens)))

    async def _both(self, watch: _Watch, family: Family, call: Callable[[ReleaseRow], Awaitable[Any]]) -> Any:
        """The answers of both releases, the watched one first; None if one cannot answer. The first call alternates,
        because the second may be faster."""
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
        compared.slower += took[rows[0].number] > SLOWER * took[rows[1].number]
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
        assert self._vlms is not None  # only called for VLM jobs
        with _vlm_answers():
            return await self._vlms.reply(request, _vlm_snapshot(row), time.monotonic() + self._seconds)

    async def _score(self, request: GenerationRequest, answer: str, row: ReleaseRow) -> float:
        assert self._vlms is not None
        with _vlm_answers():
            deadline = time.monotonic() + self._seconds
            return (await self._vlms.score(request, (answer,), _vlm_snapshot(row), deadline))[0]


@contextmanager
def _vlm_answers() -> Iterator[None]:
    """Drop failures that say nothing about the release (busy, late, no replica); let AdapterUnservable through."""
    try:
        yield
    except AdapterUnservable:
        raise
    except RatchetError:
        raise _Dropped from None


def _vlm_snapshot(row: ReleaseRow) -> ReleaseSnapshot:
    return ReleaseSnapshot(row.number, row.clip, "", "", row.vlm)


def _digest(kind: Modality, item: Any) -> bytes:
    digest = hashlib.sha256(kind.encode())
    digest.update(np.ascontiguousarray(item).data)
    return digest.digest()


def _digest_request(request: GenerationRequest) -> bytes:
    digest = hashlib.sha256(repr(request.messages).encode("utf-8", "surrogatepass"))
    for image in request.images:
        digest.update(repr(image.shape).encode())
        with suppress(ValueError):  # an empty image has no data
            digest.update(np.ascontiguousarray(image).data)
    return digest.digest()
