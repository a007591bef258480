"""Encoder replicas: requests in batches under named adapters, and one thread for all forward passes. The engine uses
several threads inside a pass, so two passes at once would only delay each other. Work that no client waits for (the
catalog's) runs in small chunks between clients' batches.

No other thread computes with several threads: OpenMP keeps a pool for each thread that ever did, and once they
outnumber the cores, libgomp lets all sleep between two products. Waking them made a text of 16 ms take 32."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from ray import serve

from core import metrics
from core.artifacts import Artifacts
from core.errors import AdapterError, RatchetError
from core.ledger import Ledger
from core.priority import idle_thread, nice_process, nice_thread, pace_thread, return_free_memory
from core.request_context import note
from core.settings import Settings
from serving.messages import (
    IMAGE_COST,
    MODEL_NICE,
    TEXT_COST,
    EncodeRequest,
    EncodeResult,
    HeadsResult,
    Modality,
    joined,
)
from serving.ray.replica_process import begin_replica, freeze_gc
from serving.releases.residency import ResidencyRows, ResidencySource
from serving.releases.types import BASE, Prepared
from serving.replicas.adapter_cache import AdapterCache, AdapterFolders, adapters_path
from serving.replicas.fair_batches import FairBatches
from serving.replicas.follower import ResidencyFollower, check_start
from serving.replicas.forward_health import ForwardHealth, is_persistent

if TYPE_CHECKING:  # the process that deploys this class imports this module, and needs no torch
    from serving.engines.clip import ClipEngine

log = logging.getLogger("ratchet.encoder")

EncodeCall = tuple[Modality, Any, str | None, str, float]
"""Kind, items, adapter, caller and seconds left of a request."""

LOADING_NICE = 19
"""Of threads that load adapters and run golden inputs."""
LOADING_SHARE = 0.05
"""Share of the cores for such a thread while requests come. Even at low priority it slows down passes on other cores:
two replicas that load at a fortieth of two cores make passes of a ViT-B/32 4% longer, at a quarter a sixth."""
PACED_SECONDS = 120.0
"""Limit for a paced load, which then restarts without pauses: operators wait for it, and at idle priority it would
never end where other processes take all cores."""
BUSY_SECONDS = 1.0
"""Time since the last pass in which more requests are expected."""
BACKGROUND_COST = 4 * IMAGE_COST
"""Of a background chunk: four images at 12 ms each delay a request by 50 ms at most."""
SHAPES = 64
"""Enough for some 16 kinds of batches with four kinds of layers each. Batches of ever new shapes were as fast with 64
as with 256 and 1,024; with 256 an encoder had 50 MB more, and grew for a quarter of an hour."""
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own, and that of ideep, through which torch calls it. Read once, when the first kernel is made."""


class LoadPatienceOver(Exception):
    """A load that yields must stop yielding."""


class EncoderWorker:
    """Encodes under named adapters; loads missing ones on request. Use from one event loop."""

    def __init__(self, engine: ClipEngine, artifacts: AdapterFolders, replica: str, max_batch: int = 16) -> None:
        """``max_batch``: most images in a forward pass, or four times as many texts."""
        import torch

        self.engine = engine
        self.artifacts = artifacts
        self.replica = replica
        self._batches = FairBatches(self.encode_batch, max_batch * IMAGE_COST)
        self._compute = ThreadPoolExecutor(1, "encode", torch.set_num_threads, (torch.get_num_threads(),))
        self._loading = ThreadPoolExecutor(1, "load", _begin_loading, (self._loading_gives_way,))
        self._yielding = ThreadPoolExecutor(1, "load-idle", _begin_yielding, (self._check_patience,))
        self._lock = threading.Lock()
        self._probe_rows = engine.tokenizer.rows(["alive"])
        self._prepared: dict[str | None, Prepared] = {}
        self._inside = self._running = 0
        self._last_pass = self._paced_until = -math.inf
        self._hurrying = 0
        self._background = asyncio.Lock()
        self._health = ForwardHealth()

    async def encode(self, calls: Sequence[EncodeCall]) -> list[EncodeResult]:
        """Encode several requests, each with a result of its own."""
        return await asyncio.gather(*(self.encode_one(*call) for call in calls))

    async def encode_one(
        self, kind: Modality, payload: Any, adapter: str | None, caller: str, seconds: float
    ) -> EncodeResult:
        """Encode one request's items (uint8 [n, S, S, 3], or n lists of token IDs), in batches with other requests.
        ``caller`` takes turns with others; ``seconds``: time left."""
        deadline = time.monotonic() + seconds
        note(adapter or BASE)
        self._count(inside=1)
        try:
            if (refusal := await self._load_missing(adapter)) is not None:
                return refusal
            result = await self._batches.submit(EncodeRequest(kind, payload, adapter, deadline, caller))
            if result.code == "failed":  # the batch's log line covers several requests
                log.warning("a request was not encoded: %s", result.error)
            return result
        finally:
            self._count(inside=-1)

    async def encode_batch(self, requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        self._count(running=len(requests))
        try:
            return await asyncio.get_running_loop().run_in_executor(self._compute, self.encode_now, requests)
        finally:
            self._count(running=-len(requests))
            self._last_pass = time.monotonic()

    def encode_now(self, requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        """Encode a batch on the caller's thread. If the pass fails, each request is tried alone, so that only the one
        at fault fails. Raises what the pass raised if the device is lost: the calls are repeated on another replica."""
        kind, adapter = requests[0].kind, requests[0].adapter
        began = time.perf_counter()
        try:
            vectors = self._forward(kind, adapter, [request.payload for request in requests])
            spaces = self.engine.spaces(adapter)
        except RatchetError as error:
            return [EncodeResult(None, adapter, code="adapter", error=str(error))] * len(requests)
        except Exception as error:
            if len(requests) > 1 and not is_persistent(error):
                return [result for request in requests for result in self.encode_now([request])]
            self._health.failed(error)
            log.warning("a forward pass failed: %s: %s", type(error).__name__, str(error)[:300])
            if is_persistent(error):
                raise
            return [EncodeResult(None, adapter, code="failed", error=f"{type(error).__name__}: {error}"[:300])]
        self._health.succeeded()
        metrics.encoder.batch(kind, len(vectors), time.perf_counter() - began)
        ends = np.cumsum([len(request.payload) for request in requests])[:-1]
        scale = float(self.engine.logit_scale)
        return [EncodeResult(part, adapter, spaces.image, spaces.text, scale) for part in np.split(vectors, ends)]

    def _forward(self, kind: Modality, adapter: str | None, payloads: list[Any]) -> npt.NDArray[np.float32]:
        items: Any = np.concatenate(payloads) if kind == "image" else [row for rows in payloads for row in rows]
        run: Any = self.engine.encode_images if kind == "image" else self.engine.encode_tokens
        try:
            self._ensure(adapter)
            vectors: npt.NDArray[np.float32] = run(items, adapter)
        except AdapterError:  # unloaded meanwhile: load it again, once
            self._ensure(adapter)
            vectors = run(items, adapter)
        return vectors

    async def encode_background(self, kind: Modality, payload: Any, adapter: str | None) -> EncodeResult:
        """Encode items that no client waits for, in small chunks while no batch waits (but at least one a second)."""
        loop = asyncio.get_running_loop()
        parts: list[EncodeResult] = []
        size = BACKGROUND_COST // (IMAGE_COST if kind == "image" else TEXT_COST)
        for start in range(0, len(payload), size):
            request = EncodeRequest(kind, payload[start : start + size], adapter, math.inf)
            async with self._background:  # one chunk at a time over all calls: a batch waits for one at most
                patience = time.monotonic() + 1.0
                while self._running and time.monotonic() < patience:
                    await asyncio.sleep(0.002)
                parts += await loop.run_in_executor(self._compute, self.encode_now, [request])
            if parts[-1].vectors is None:
                return parts[-1]
        return joined(parts)

    async def heads(self, clip: str | None) -> HeadsResult:
        if (refusal := await self._load_missing(clip)) is not None:
            return HeadsResult({}, refusal.error)
        try:
            return HeadsResult(dict(self.engine.heads(clip)))
        except AdapterError:  # unloaded meanwhile: the caller tries again
            return HeadsResult({}, f"{clip} is being unloaded")

    async def prepare(self, clip: str | None) -> Prepared:
        """Load the adapter next to what is served, and check its golden outputs. Loaded adapters are answered at once,
        even while the files of another do not arrive."""
        if (known := self._held(clip)) is not None:
            return known
        loop = asyncio.get_running_loop()
        self._paced_until = time.monotonic() + PACED_SECONDS
        if self._loading_gives_way():
            with suppress(LoadPatienceOver):
                return await loop.run_in_executor(self._yielding, self.prepare_now, clip)
        return await loop.run_in_executor(self._loading, self.prepare_now, clip)

    def prepare_now(self, clip: str | None) -> Prepared:
        """:meth:`prepare` on the caller's thread."""
        if (known := self._held(clip)) is not None:
            return known
        try:
            self._ensure(clip)
            self.engine.golden(clip)
            spaces = self.engine.spaces(clip)
        except LoadPatienceOver:
            self._drop(clip)
            raise
        except Exception as error:
            self._drop(clip)
            return Prepared.failed(self.replica, clip, error)
        self._prepared[clip] = Prepared(self.replica, clip, spaces.image, spaces.text)
        return self._prepared[clip]

    def _held(self, clip: str | None) -> Prepared | None:
        return self._prepared.get(clip) if clip is None or clip in self.engine.resident else None

    async def _load_missing(self, clip: str | None) -> EncodeResult | None:
        """Load an adapter before a request for it is batched, so that slow artifacts delay only the requests for it.
        Returns the answer if it cannot be loaded."""
        if clip is None or clip in self.engine.resident:
            return None
        self._hurrying += 1
        try:
            prepared = await self.prepare(clip)
        finally:
            self._hurrying -= 1
        return EncodeResult(None, clip, code="adapter", error=prepared.error) if prepared.error else None

    def _loading_gives_way(self) -> bool:
        """True while requests come, and none of them waits for the adapter that is being loaded."""
        now = time.monotonic()
        busy = self._running > 0 or now - self._last_pass < BUSY_SECONDS
        return busy and not self._hurrying and now < self._paced_until

    def _check_patience(self) -> bool:
        """Same for a load at idle priority. Raises LoadPatienceOver where it must not yield any more."""
        if self._hurrying or time.monotonic() >= self._paced_until:
            raise LoadPatienceOver
        return self._loading_gives_way()

    async def retire(self, keep: Sequence[str | None]) -> list[str]:
        """Unload adapters that are not kept; a late request loads its adapter again. In a thread, because loading an
        adapter holds the lock for seconds."""

        def unload() -> list[str]:
            gone = [name for name in self.engine.resident if name not in keep]
            for name in gone:
                self._drop(name)
            if gone:
                return_free_memory()
            return gone

        return await asyncio.to_thread(unload)

    async def status(self) -> dict[str, Any]:
        base = self.engine.base
        return {
            "replica": self.replica, "precision": self.engine.precision,
            "device": self.engine.device.type, "base": base.name, "base_digest": base.digest,
            "resident": list(self.engine.resident),
        }  # fmt: skip

    async def check_health(self) -> None:
        """Raise RuntimeError when forward passes fail repeatedly; run a small one now and then."""

        def probe() -> None:  # through the base, whose weights every adapter shares
            size = self.engine.base.preprocess.size
            self.engine.encode_tokens(self._probe_rows)
            self.engine.encode_images(np.zeros((1, size, size, 3), np.uint8))

        run = asyncio.get_running_loop().run_in_executor
        await self._health.check(lambda: run(self._compute, probe), busy=self._running > 0)

    def _count(self, inside: int = 0, running: int = 0) -> None:
        self._inside += inside
        self._running += running
        metrics.encoder.inside(min(self._running, self._inside), max(0, self._inside - self._running))

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


class Encoder(EncoderWorker):
    """The deployment: holds the base, and the adapters of the resident releases. Starts from the last known residency
    while the ledger is away, and with the newest loadable adapter if the live one's files are gone."""

    def __init__(self, settings: Settings) -> None:
        nice_process(MODEL_NICE)
        begin_replica(settings, "encoder")
        bound_kernel_caches()
        self.settings = settings
        ledger = Ledger.lazy(settings.ledger)
        self._adapters = AdapterCache(Artifacts(settings.artifacts), adapters_path(settings.home), ledger)
        source = ResidencySource.of(settings, ledger, "encoder", self._adapters.digests)
        with ThreadPoolExecutor(1, "start") as starting:  # its OpenMP threads end with it: see the module's docstring
            engine = starting.submit(self.make_engine, settings).result()
        replica = serve.get_replica_context().replica_tag
        super().__init__(engine, self._adapters, replica, settings.serve.max_batch)
        self._follower = ResidencyFollower("encoder", source.read, self._load, source.keep)
        rows = source.newest()
        self._adapters.expect(source.adapters)
        needed = rows.needed("clip")
        check_start([*self._compute.map(self.prepare_now, dict.fromkeys([*needed, *rows.clips]))], needed)
        freeze_gc()

    def make_engine(self, settings: Settings) -> ClipEngine:
        from serving.engines.clip import ClipEngine
        from serving.engines.clip_base import import_open_clip, load_base

        base = load_base(settings.home, settings.base.clip)
        import_open_clip(base.model_cfg)
        return ClipEngine.of(settings, base)

    async def adopt(self, clips: Sequence[str | None]) -> str:
        """The controller has committed these adapters as resident, the live one first."""
        self._follower.mark_in_step()
        return self.replica

    async def check_health(self) -> None:
        """Serve asks this every few seconds. Raises when this replica lags behind or its passes fail."""
        await super().check_health()
        await self._follower.check()

    async def _load(self, rows: ResidencyRows) -> list[Prepared]:
        self._adapters.protect([*rows.clips, *rows.vlms])
        return [await self.prepare(clip) for clip in rows.needed("clip")]


def bound_kernel_caches() -> None:
    """Bound the shapes that oneDNN keeps kernels for. Call before this process computes; values in the environment
    stay. By default oneDNN keeps 1,024 kernels and as many descriptions, up to 0.7 MB a pair; batches of texts have
    more shapes, and an encoder of 445 MB grew to more than a gigabyte."""
    for name in VARIABLES:
        os.environ.setdefault(name, str(SHAPES))


def _begin_yielding(gives_way: Callable[[], bool]) -> None:
    idle_thread()
    _begin_loading(gives_way)


def _begin_loading(gives_way: Callable[[], bool]) -> None:
    import torch

    from serving.engines.processor import usable_cores

    nice_thread(LOADING_NICE)
    pace_thread(min(1.0, LOADING_SHARE * usable_cores()), gives_way)
    torch.set_num_threads(1)  # for this thread, and for threads that have not used torch yet
