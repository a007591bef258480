"""Vectors of a request's texts and images, from the cache or from encoders. Vectors of another embedding space than the
release's are refused, and never cached. Callers take turns, and only as much work begins as keeps the encoders busy:
200 requests with 32 small pictures each, all decoded at once, kept two cores from the encoder for 1.5 s."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from ray.serve.handle import DeploymentHandle

from core import metrics
from core.settings.serving import Serve
from serving.engines.heads import Head, HeadScores
from serving.engines.tokens import Tokenizer
from serving.errors import AdapterUnservable, DeadlineExceeded, Unavailable, WrongSpace
from serving.http.errors import ApiError, field_error
from serving.http.fair_room import FairRoom
from serving.http.image_loader import ImageLoader, ImageSource, gathered
from serving.messages import IMAGE_COST, TEXT_COST, EncodeRequest, EncodeResult, HeadsResult, Modality, joined
from serving.own_threads import OwnThreads
from serving.ray.replica_calls import Attempts, call_another
from serving.releases.shadow_traffic import ShadowTraffic
from serving.releases.types import ReleaseSnapshot
from serving.replicas.fair_batches import FairBatches, Group

_CacheKey = tuple[Modality, str, bytes]
"""Kind, embedding space, SHA-256 of the content: vectors of one release cannot be returned for another."""
ENTRY_BYTES: Final = 640
"""An entry's size without its numbers: array (112), digest (65), key and entry (150), places in two dicts and a linked
list (300)."""
BATCHES_IN_WORK = 6
"""For each encoder, counted from opening images and tokenizing texts until their vectors have arrived."""
TOKENIZER_THREADS = 2
"""Apart, so that work that waits for a store cannot delay texts."""
HEAD_THREADS = 2
INLINE_CHARS = 4096
"""Texts up to this length are tokenized in the event loop, in less than a millisecond; longer ones in a thread."""
PATIENCE_SECONDS = 1.0
"""After which a call no longer counts among those: its encoder may hang, and others answer."""
KEPT_QUEUES = 16
"""Kinds and adapters whose queues are kept, more than are asked at once."""
KEPT_HEADS = 8
"""Adapters whose heads are kept, slightly more than are resident. Adapters never change."""
Encoded = tuple[EncodeResult, list[int], list[bool]]
"""An encoder's answer; for each item its number of tokens, and whether it was cut."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedVector:
    """One item's vector, float32 [dim] of unit length."""

    vector: npt.NDArray[np.float32]
    logit_scale: float
    tokens: int
    cut: bool = False
    """True if the text was longer than the model reads."""


class VectorCache:
    """A least-recently-used cache, for one event loop. ``max_bytes``: of all entries; 0: nothing is kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._entries: OrderedDict[_CacheKey, CachedVector] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: _CacheKey) -> CachedVector | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: _CacheKey, entry: CachedVector) -> None:
        """Keep an entry, and drop the oldest ones above the limit."""
        if key in self._entries or entry.vector.nbytes + ENTRY_BYTES > self.max_bytes:
            return
        self._entries[key] = entry
        self.bytes += entry.vector.nbytes + ENTRY_BYTES
        while self.bytes > self.max_bytes:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.vector.nbytes + ENTRY_BYTES


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """Vectors of items of one kind, in their order: float32 [n, dim] of unit length."""

    rows: npt.NDArray[np.float32]
    logit_scale: float
    tokens: int
    """Of all texts together, start and end included."""
    cut: tuple[int, ...] = ()
    """Positions of texts that are longer than the model reads: the vector is of their beginning."""

    @property
    def headers(self) -> dict[str, str]:
        """The number of cut texts, if any."""
        return {"x-ratchet-truncated": str(len(self.cut))} if self.cut else {}


class EncoderCalls:
    """Calls to encoder replicas, repeated on another replica when one dies. Replicas return expected failures as
    values; exceptions come from the transport. Requests of more than ``max_batch`` images are sent in several pieces.
    ``shadow_traffic`` is offered what was encoded.

    Each encoder has one call of a kind and adapter at a time, and a second one if that is a whole batch. Requests that
    come meanwhile wait here, and go together: a call costs as much processor as the rest of a request, and slows down
    the pass that runs. On two cores, 2 and 8 callers with a text each got 55 and 105 answers a second with two calls at
    once, and 70 and 150 like this."""

    def __init__(
        self, handle: DeploymentHandle, max_batch: int, shadow_traffic: ShadowTraffic | None = None, encoders: int = 1
    ) -> None:
        self.handle = handle
        self.shadow_traffic = shadow_traffic
        self.budget = max_batch * IMAGE_COST
        self._encoders = encoders
        self._queues: OrderedDict[Group, FairBatches] = OrderedDict()

    async def encode(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str = ""
    ) -> EncodeResult:
        """Vectors of items (uint8 [n, S, S, 3], or n lists of token IDs), all by the snapshot's adapter. ``deadline``:
        on the monotonic clock. Raises QueueFull, DeadlineExceeded, Unavailable, WrongSpace, ApiError for values that
        are not finite."""
        space = snapshot.image_space if kind == "image" else snapshot.text_space

        def strays(result: EncodeResult) -> bool:
            return not result.code and result.space(kind) != space

        def refusal(result: EncodeResult) -> str | None:
            return result.error if result.code in ("adapter", "failed") or strays(result) else None

        async def one(items: Any) -> EncodeResult:
            attempts = Attempts(deadline - time.monotonic(), "encoder", "Send fewer items, or try again later.")
            request = EncodeRequest(kind, items, snapshot.clip, deadline, caller)
            call = lambda: asyncio.ensure_future(self._submit(request))  # noqa: E731
            result: EncodeResult = await call_another(call, attempts, refusal)
            if result.code == "late":
                raise attempts.over()
            if result.code == "failed":
                raise Unavailable(f"the forward pass failed ({result.error}).", "Try again; look at the encoders' log.")
            if result.code:
                raise _unservable(snapshot, result.error)
            if strays(result):
                raise WrongSpace(result.space(kind), space)
            if result.vectors is None or not np.isfinite(result.vectors).all():
                raise ApiError(500, "the model gave values that are not finite.", code="not_finite")
            return result

        step = max(1, self.budget // (IMAGE_COST if kind == "image" else TEXT_COST))
        results = await gathered(one(payload[start : start + step]) for start in range(0, len(payload), step))
        result = joined(results)
        if self.shadow_traffic is not None:
            self.shadow_traffic.clip(kind, payload)
        return result

    async def _submit(self, request: EncodeRequest) -> EncodeResult:
        group = request.kind, request.adapter
        if group not in self._queues:
            self._queues[group] = FairBatches(
                self._send, self.budget, turn_seconds=math.inf, at_once=self._encoders, whole=self._encoders,
                patience=PATIENCE_SECONDS,
            )  # fmt: skip
            while len(self._queues) > KEPT_QUEUES:
                self._queues.popitem(last=False)
        self._queues.move_to_end(group)
        return await self._queues[group].submit(request)

    async def _send(self, requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        now = time.monotonic()
        calls = [(each.kind, each.payload, each.adapter, each.caller, each.deadline - now) for each in requests]
        async with asyncio.timeout(max(seconds for *_, seconds in calls)):
            results: list[EncodeResult] = await self.handle.encode.remote(calls)
        return results

    async def heads(self, snapshot: ReleaseSnapshot, deadline: float) -> Mapping[str, Head]:
        """The heads of the snapshot's adapter by name. Raises QueueFull, DeadlineExceeded, Unavailable."""
        attempts = Attempts(deadline - time.monotonic(), "encoder", "Try again later.")
        call = lambda: self.handle.heads.remote(snapshot.clip)  # noqa: E731
        result: HeadsResult = await call_another(call, attempts, lambda result: result.error or None)
        if result.error:
            raise _unservable(snapshot, result.error)
        return result.heads


def _unservable(snapshot: ReleaseSnapshot, error: str) -> AdapterUnservable:
    return AdapterUnservable(f"{snapshot.adapter} cannot be served: {error}.", "An operator must look at it.")


class ClipVectors:
    """Vectors, and classification by heads. Use from one event loop; texts and images share the cache."""

    def __init__(self, encoders: EncoderCalls, images: ImageLoader, tokenizer: Tokenizer, settings: Serve) -> None:
        self.encoders = encoders
        self.images = images
        self.tokenizer = tokenizer
        self.cache = VectorCache(settings.cache_bytes)
        self.room = room_for(settings)
        self._tokenizing = OwnThreads("tokenizer", TOKENIZER_THREADS)
        self._classifying = OwnThreads("heads", HEAD_THREADS)
        self._heads: OrderedDict[str | None, Mapping[str, Head]] = OrderedDict()

    async def of_texts(
        self, texts: Sequence[str], snapshot: ReleaseSnapshot, deadline: float, caller: str, whole: Sequence[str] = ()
    ) -> Vectors:
        """Vectors of at least one checked text. ``whole``: names of the texts, if none may be cut (ApiError). Raises
        QueueFull, DeadlineExceeded, Unavailable."""

        def tokenized(texts: list[str]) -> tuple[list[list[int]], list[bool]]:
            rows = self.tokenizer.rows(texts)
            return rows, [self.tokenizer.cuts(text, row) for text, row in zip(texts, rows, strict=True)]

        async def encode(missing: list[int]) -> Encoded:
            chosen = [texts[index] for index in missing]
            short = sum(len(text) for text in chosen) <= INLINE_CHARS
            rows, cut = tokenized(chosen) if short else await self._tokenizing.run(tokenized, chosen)
            if whole and any(cut):
                raise _too_long(whole[missing[cut.index(True)]])
            answer = await self.encoders.encode("text", rows, snapshot, deadline, caller)
            return answer, [len(row) for row in rows], cut

        digests = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        async with self._turn(caller, len(texts) * TEXT_COST, deadline):
            vectors = await self._vectors("text", snapshot.text_space, digests, encode)
        if whole and vectors.cut:
            raise _too_long(whole[vectors.cut[0]])
        return vectors

    async def of_images(
        self, images: Sequence[ImageSource], snapshot: ReleaseSnapshot, deadline: float, caller: str
    ) -> Vectors:
        """Vectors of at least one image. Cached images are not decoded, only their headers are read. Raises ApiError
        for a refused image, QueueFull, DeadlineExceeded, Unavailable."""

        async def encode(missing: list[int]) -> Encoded:
            async with self.images.decoded([inspected[index] for index in missing], caller) as pixels:
                answer = await self.encoders.encode("image", pixels, snapshot, deadline, caller)
            return answer, [0] * len(missing), [False] * len(missing)

        async with self._turn(caller, len(images) * IMAGE_COST, deadline):
            inspected = await self.images.inspect(images, caller)
            return await self._vectors("image", snapshot.image_space, [image.digest for image in inspected], encode)

    @asynccontextmanager
    async def _turn(self, caller: str, cost: int, deadline: float) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                inside = await self.room.enter(caller, cost)
        except TimeoutError:
            raise DeadlineExceeded(
                "the deadline passed before it was the request's turn.", "Send fewer items, or try again later."
            ) from None
        try:
            yield
        finally:
            self.room.leave(caller, inside)

    async def _vectors(
        self, kind: Modality, space: str, digests: Sequence[bytes], encode: Callable[[list[int]], Awaitable[Encoded]]
    ) -> Vectors:
        if not self.cache.max_bytes:
            answer, tokens, cut = await encode(list(range(len(digests))))
            assert answer.vectors is not None
            return Vectors(answer.vectors, answer.logit_scale, sum(tokens), _places(cut))
        entries: dict[bytes, CachedVector] = {}
        missing: dict[bytes, int] = {}
        for index, digest in enumerate(digests):
            if digest in entries or digest in missing:
                continue
            if (entry := self.cache.get((kind, space, digest))) is not None:
                entries[digest] = entry
            else:
                missing[digest] = index
        metrics.http.cache_lookups(kind, len(digests) - len(missing), len(missing))
        if missing:
            answer, tokens, cut = await encode(list(missing.values()))
            assert answer.vectors is not None
            for digest, vector, count, is_cut in zip(missing, answer.vectors, tokens, cut, strict=True):
                # A copy, so that an entry does not hold the memory of a whole batch.
                entries[digest] = CachedVector(vector.copy(), answer.logit_scale, count, is_cut)
                self.cache.put((kind, space, digest), entries[digest])
            metrics.http.cached(self.cache.bytes)
        items = [entries[digest] for digest in digests]
        return Vectors(
            np.stack([item.vector for item in items]), items[0].logit_scale, sum(item.tokens for item in items),
            _places([item.cut for item in items]),
        )  # fmt: skip

    async def head(self, name: str, snapshot: ReleaseSnapshot, deadline: float) -> Head:
        """A head of the snapshot's adapter. Raises ApiError if the release has none of this name, QueueFull,
        DeadlineExceeded, Unavailable."""
        heads = self._heads.get(snapshot.clip)
        if heads is None:
            heads = self._heads[snapshot.clip] = await self.encoders.heads(snapshot, deadline)
            while len(self._heads) > KEPT_HEADS:
                self._heads.popitem(last=False)
        if name not in heads:
            there = (
                f"It has {', '.join(sorted(heads))}." if heads else "It has none: see updater.heads in the settings."
            )
            raise field_error("head", f"release {snapshot.release} has no head {name!r}. {there}", "no_head", 404)
        self._heads.move_to_end(snapshot.clip)
        return heads[name]

    async def classify(self, head: Head, vectors: npt.NDArray[np.float32]) -> HeadScores:
        return await self._classifying.run(head.classify, vectors)


def room_for(settings: Serve) -> FairRoom:
    """Room for the work in progress of one ingress process."""
    encoders = max(settings.encoder_replicas, settings.encoder_max_replicas) / settings.ingress_replicas
    return FairRoom(BATCHES_IN_WORK * encoders * settings.max_batch * IMAGE_COST, settings.caller_share)


def _places(cut: Sequence[bool]) -> tuple[int, ...]:
    return tuple(index for index, is_cut in enumerate(cut) if is_cut)


def _too_long(name: str) -> ApiError:
    problem = "the text has more tokens than the model reads. Send a shorter one, or leave `truncate` out."
    return field_error(name, problem, "text_too_long")
