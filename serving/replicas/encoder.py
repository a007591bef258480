"""Encoder replicas: the Ray shell around :class:`serving.replicas.encoder_worker.EncoderWorker`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray import serve

from ops import metrics
from ops.artifacts import Artifacts
from ops.ledger import Ledger
from ops.settings import Settings
from serving.engines.base import load_base
from serving.engines.clip import ClipEngine
from serving.messages import IMAGE_COST, EncodeRequest, EncodeResult, Kind, batch_cost
from serving.ray.loopback import close_replica_port
from serving.releases.residency import ResidencyRows, read_residency
from serving.releases.types import Prepared
from serving.replicas.encoder_worker import EncoderWorker

log = logging.getLogger("ratchet.encoder")
FOLLOW_SECONDS = 2.0
LAG_SECONDS = 60.0
"""A replica that could not load the live release for this long says so to Serve, which replaces it."""


class Encoder:
    """Holds the base once, and the adapters of the resident releases. Healthy only when the live release is loaded."""

    def __init__(self, settings: Settings) -> None:
        close_replica_port()
        metrics.build.started("encoder")
        self.settings = settings
        self.ledger = Ledger.open(settings.ledger, migrate=False)
        engine = ClipEngine(load_base(settings.home, settings.base.clip), threads=settings.serve.encoder_threads)
        self.worker = EncoderWorker(engine, Artifacts(settings.artifacts), serve.get_replica_context().replica_tag)
        self.batch.set_max_batch_size(settings.serve.max_batch * IMAGE_COST)
        self.batch.set_batch_wait_timeout_s(settings.serve.batch_wait_seconds)
        self._in_step = time.monotonic()
        self._trouble = ""
        self._inside = self._running = 0
        rows = self._resident()
        needed = [row.clip for row in rows.answering] or [None]
        for clip in dict.fromkeys([*needed, *rows.clips]):
            prepared = self.worker.prepare_now(clip)
            if prepared.error and clip in needed:
                raise RuntimeError(f"the live release cannot be loaded: {prepared.error}")
        self._follower: asyncio.Task[None] | None = None

    async def encode(self, kind: Kind, payload: Any, adapter: str | None, deadline: float) -> EncodeResult:
        """Vectors of one request's items; batched with those of other requests."""
        self._inside += 1
        self._tell()
        try:
            answer: EncodeResult = await self.batch(EncodeRequest(kind, payload, adapter, deadline))
            return answer
        finally:
            self._inside -= 1
            self._tell()

    @serve.batch(max_batch_size=16 * IMAGE_COST, batch_wait_timeout_s=0.005, batch_size_fn=batch_cost)  # type: ignore[untyped-decorator]
    async def batch(self, works: list[EncodeRequest]) -> list[EncodeResult]:
        """One dynamic batch, bounded by cost."""
        self._running = len(works)
        self._tell()
        try:
            return await self.worker.encode(works)
        finally:
            self._running = 0
            self._tell()

    async def encode_background(self, kind: Kind, payload: Any, adapter: str | None) -> EncodeResult:
        """Vectors for the catalog and for comparisons, at low priority."""
        return await self.worker.encode_background(kind, payload, adapter)

    async def prepare(self, clip: str | None) -> Prepared:
        """Phase one of a release; see :meth:`EncoderWorker.prepare`."""
        return await self.worker.prepare(clip)

    async def adopt(self, clips: Sequence[str | None]) -> str:
        """The controller committed: these adapters are resident, the live one first."""
        self._in_step = time.monotonic()
        return self.worker.replica

    async def retire(self, keep: Sequence[str | None]) -> list[str]:
        """Unload what left the rollback window."""
        return self.worker.retire(keep)

    async def check_health(self) -> None:
        """Serve asks this every few seconds. Starts the follower, and raises when this replica lags behind for long."""
        if self._follower is None or self._follower.done():
            self._follower = asyncio.get_running_loop().create_task(self._follow())
        lag = time.monotonic() - self._in_step
        if lag > LAG_SECONDS:
            raise RuntimeError(f"behind the live release for {lag:.0f} s: {self._trouble}")

    def _resident(self) -> ResidencyRows:
        return read_residency(self.ledger, self.settings.serve.rollback_window)

    def _tell(self) -> None:
        metrics.encoder.inside(min(self._running, self._inside), max(0, self._inside - self._running))

    async def _follow(self) -> None:
        """The safety net under the controller's broadcast: look at the ledger, and load what is missing."""
        while True:
            try:
                rows = await asyncio.to_thread(self._resident)
                needed = dict.fromkeys([row.clip for row in rows.answering] or [None])
                prepared = [await self.worker.prepare(clip) for clip in needed]
                self._trouble = "; ".join(each.error for each in prepared if each.error)
                if not self._trouble:
                    self._in_step = time.monotonic()
                    if rows.window:
                        metrics.release.live("encoder", rows.window[0].number)
            except Exception as error:  # the ledger is away: serve on with what is loaded
                self._trouble = f"{type(error).__name__}: {error}"
                log.warning("cannot follow the ledger: %s", self._trouble)
            await asyncio.sleep(FOLLOW_SECONDS)
