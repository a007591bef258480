"""One encoder replica's work, free of Ray: resident adapters, batches by adapter, and room for background work.

All forward passes go through one thread: the engine uses its own threads inside a pass, and two passes at once would
only make each other late. Work that nobody waits for (the catalog's) goes in small chunks between the batches that
somebody waits for.

No other thread of the process computes with several threads. OpenMP keeps those of each thread that ever did; when they
are more than the cores, libgomp lets all of them sleep between two products, and waking them up again at each product
made a text of 16 ms take 32.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from core import metrics
from core.errors import AdapterError, RatchetError
from core.priority import idle_thread, nice_thread, pace_thread, return_free_memory
from serving.engines.backends import usable_cores
from serving.engines.clip import ClipEngine
from serving.messages import IMAGE_COST, TEXT_COST, EncodeRequest, EncodeResult, HeadsResult, Modality, joined
from serving.releases.types import Prepared, cause_of
from serving.replicas.adapter_cache import AdapterFolders
from serving.replicas.forward_health import ForwardHealth, is_persistent

log = logging.getLogger("ratchet.encoder")

LOADING_NICE = 19
"""Of threads that load adapters and run golden inputs."""
LOADING_SHARE = 0.0125
"""Of the machine's cores, for such a thread while requests come. It gives way at once on a core, and still slows down
the passes on others: two replicas that load at a fortieth of two cores make each pass of a ViT-B/32 4% longer, at a
quarter a sixth."""
PACED_SECONDS = 120.0
"""Of one load; then it begins again without rests, and gives way no more than any nice thread. Operators wait for it,
and where other processes take all cores, what gives way at once never ends."""
BUSY_SECONDS = 1.0
"""Since the last pass: other requests may come."""
BACKGROUND_COST = 4 * IMAGE_COST
"""Of one background chunk: at 12 ms an image, a request waits at most 50 ms for four of them."""


class _Hurried(Exception):
    """A load that gives way is to give way no more."""


class EncoderWorker:
    """Encodes under named adapters; loads one that is asked for and not resident. Use from one event loop."""

    def __init__(self, engine: ClipEngine, artifacts: AdapterFolders, replica: str) -> None:
        self.engine = engine
        self.artifacts = artifacts
        self.replica = replica
        self._compute = ThreadPoolExecutor(1, "encode", torch.set_num_threads, (torch.get_num_threads(),))
        self._loading = ThreadPoolExecutor(1, "load", _begin_loading, (self._loading_gives_way,))
        self._yielding = ThreadPoolExecutor(1, "load-idle", _begin_yielding, (self._check_patience,))
        self._lock = threading.Lock()
        self._probe_rows = engine.tokenizer.rows(["alive"])
        self._prepared: dict[str | None, Prepared] = {}
        self._waiting = 0
        self._last_pass = -math.inf
        self._paced_until = -math.inf
        self._hurrying = 0
        self._background = asyncio.Lock()
        self._health = ForwardHealth()

    async def prepare(self, clip: str | None) -> Prepared:
        """Hold the adapter beside what is served, and check its golden outputs. The answer says what is wrong.

        What is held already is answered at once, also while another adapter's files do not come.
        """
        if (known := self._held(clip)) is not None:
            return known
        loop = asyncio.get_running_loop()
        self._paced_until = time.monotonic() + PACED_SECONDS
        if self._loading_gives_way():
            with suppress(_Hurried):
                return await loop.run_in_executor(self._yielding, self.prepare_now, clip)
        return await loop.run_in_executor(self._loading, self.prepare_now, clip)

    def prepare_at_start(self, clips: Iterable[str | None]) -> list[Prepared]:
        """Same for several, before anything is asked."""
        return list(self._compute.map(self.prepare_now, clips))

    def prepare_now(self, clip: str | None) -> Prepared:
        """Same, on the caller's thread."""
        if (known := self._held(clip)) is not None:
            return known
        try:
            self._ensure(clip)
            self.engine.golden(clip)
            spaces = self.engine.spaces(clip)
        except _Hurried:
            self._drop(clip)
            raise
        except Exception as error:
            self._drop(clip)
            reason = str(error) if isinstance(error, RatchetError) else f"{type(error).__name__}: {error}"[:500]
            return Prepared(self.replica, clip, error=reason, cause=cause_of(error))
        self._prepared[clip] = Prepared(self.replica, clip, spaces.image, spaces.text)
        return self._prepared[clip]

    async def load_missing(self, clip: str | None) -> EncodeResult | None:
        """Load an adapter that is not resident before a request for it is batched: artifacts that do not answer hold up
        who asked for it, and not the forward passes of others. Returns the answer where it cannot be loaded.
        """
        if clip is None or clip in self.engine.resident:
            return None
        self._hurrying += 1
        try:
            prepared = await self.prepare(clip)
        finally:
            self._hurrying -= 1
        return EncodeResult(None, clip, code="adapter", error=prepared.error) if prepared.error else None

    async def heads(self, clip: str | None) -> HeadsResult:
        """The heads of an adapter; the error where it cannot be loaded."""
        if (refusal := await self.load_missing(clip)) is not None:
            return HeadsResult({}, refusal.error)
        try:
            return HeadsResult(dict(self.engine.heads(clip)))
        except AdapterError:  # unloaded in the moment between: who asks tries again
            return HeadsResult({}, f"{clip} is being unloaded")

    def _loading_gives_way(self) -> bool:
        """Whether requests come, and none of them waits for what is being loaded."""
        now = time.monotonic()
        busy = self._waiting > 0 or now - self._last_pass < BUSY_SECONDS
        return busy and not self._hurrying and now < self._paced_until

    def _check_patience(self) -> bool:
        """The same for a load that gives way at once. Raises _Hurried where it may not any more."""
        if self._hurrying or time.monotonic() >= self._paced_until:
            raise _Hurried
        return self._loading_gives_way()

    def status(self) -> dict[str, Any]:
        """What an operator wants to know of this replica."""
        choice, base = self.engine.choice, self.engine.base
        return {
            "replica": self.replica, "engine": choice.engine, "precision": choice.precision,
            "device": self.engine.device.type, "base": base.name, "base_digest": base.digest,
            "resident": list(self.engine.resident),
        }  # fmt: skip

    def _held(self, clip: str | None) -> Prepared | None:
        return self._prepared.get(clip) if clip is None or clip in self.engine.resident else None

    async def check_health(self) -> None:
        """Raise RuntimeError when forward passes fail again and again; run a small one now and then."""
        await self._health.check(self._probe, busy=self._waiting > 0)

    async def retire(self, keep: Sequence[str | None]) -> list[str]:
        """Unload adapters that are not kept. One that a late request still needs is loaded again by that request.

        In a thread: an adapter that is being loaded holds the lock for seconds.
        """
        return await asyncio.to_thread(self._retire, keep)

    def _retire(self, keep: Sequence[str | None]) -> list[str]:
        gone = [name for name in self.engine.resident if name not in keep]
        for name in gone:
            self._drop(name)
        if gone:
            return_free_memory()
        return gone

    async def encode(self, requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        """Encode a batch, all of one kind and under one adapter, in one forward pass."""
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, self.encode_now, list(requests))
        finally:
            self._waiting -= 1
            self._last_pass = time.monotonic()

    async def encode_background(self, kind: Modality, payload: Any, adapter: str | None) -> EncodeResult:
        """Encode items that nobody waits for: small chunks, each when no batch waits (but at least one a second)."""
        loop = asyncio.get_running_loop()
        parts: list[EncodeResult] = []
        size = BACKGROUND_COST // (IMAGE_COST if kind == "image" else TEXT_COST)
        for start in range(0, len(payload), size):
            request = EncodeRequest(kind, payload[start : start + size], adapter, math.inf)
            async with self._background:  # of several calls, too, one chunk at a time: a batch waits for one at most
                patience = time.monotonic() + 1.0
                while self._waiting and time.monotonic() < patience:
                    await asyncio.sleep(0.002)
                parts += await loop.run_in_executor(self._compute, self.encode_now, [request])
            if parts[-1].vectors is None:
                return parts[-1]
        return joined(parts)

    def encode_now(self, requests: list[EncodeRequest]) -> list[EncodeResult]:
        """The batch on the caller's thread."""
        first = requests[0]
        return self._encode_all(first.kind, first.adapter, [request.payload for request in requests])

    def _encode_all(self, kind: Modality, adapter: str | None, payloads: list[Any]) -> list[EncodeResult]:
        """The batch in one pass. When that fails each payload is tried alone, so that only the one at fault fails.

        Raises whatever the pass raised when the device is lost: the calls are made again on another replica.
        """
        try:
            return self._encode_group(kind, adapter, payloads)
        except Exception as error:
            if len(payloads) > 1 and not is_persistent(error):
                return [result for payload in payloads for result in self._encode_all(kind, adapter, [payload])]
            self._health.failed(error)
            log.warning("a forward pass failed: %s: %s", type(error).__name__, str(error)[:300])
            if is_persistent(error):
                raise
            return [EncodeResult(None, adapter, code="failed", error=f"{type(error).__name__}: {error}"[:300])]

    async def _probe(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._compute, self._probe_now)

    def _probe_now(self) -> None:
        """One text and one image through the base, whose weights every adapter shares."""
        size = self.engine.base.preprocess.size
        self.engine.encode_tokens(self._probe_rows)
        self.engine.encode_images(np.zeros((1, size, size, 3), np.uint8))

    def _encode_group(self, kind: Modality, adapter: str | None, payloads: list[Any]) -> list[EncodeResult]:
        began = time.perf_counter()
        try:
            try:
                vectors = self._forward(kind, adapter, payloads)
            except AdapterError:  # unloaded in the moment between: load it again, once
                vectors = self._forward(kind, adapter, payloads)
            spaces = self.engine.spaces(adapter)
        except RatchetError as error:
            return [EncodeResult(None, adapter, code="adapter", error=str(error))] * len(payloads)
        self._health.succeeded()
        metrics.encoder.batch(kind, len(vectors), time.perf_counter() - began)
        ends = np.cumsum([len(payload) for payload in payloads])[:-1]
        scale = float(self.engine.logit_scale)
        return [EncodeResult(part, adapter, spaces.image, spaces.text, scale) for part in np.split(vectors, ends)]

    def _forward(self, kind: Modality, adapter: str | None, payloads: list[Any]) -> npt.NDArray[np.float32]:
        self._ensure(adapter)
        if kind == "image":
            return self.engine.encode_images(np.concatenate(payloads), adapter)
        return self.engine.encode_tokens([row for rows in payloads for row in rows], adapter)

    def _ensure(self, adapter: str | None) -> None:
        if adapter is None or adapter in self.engine.resident:
            return
        with self._lock:
            if adapter not in self.engine.resident:
                self.engine.load(adapter, self.artifacts.fetch(f"adapters/{adapter}"))

    def _drop(self, adapter: str | None) -> None:
        self._prepared.pop(adapter, None)
        with self._lock:
            if adapter is not None and adapter in self.engine.resident:
                self.engine.unload(adapter)


def _begin_yielding(gives_way: Callable[[], bool]) -> None:
    idle_thread()
    _begin_loading(gives_way)


def _begin_loading(gives_way: Callable[[], bool]) -> None:
    nice_thread(LOADING_NICE)
    pace_thread(min(1.0, LOADING_SHARE * usable_cores()), gives_way)
    torch.set_num_threads(1)  # of this thread, and of those that have not asked torch for anything so far
