"""Encoder replicas: the Ray shell around :class:`serving.replicas.encoder_worker.EncoderWorker`."""

from __future__ import annotations

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
from serving.replicas.follower import ResidencyFollower


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
        self._follower = ResidencyFollower("encoder", self._residency, self._load)
        self._inside = self._running = 0
        rows = self._residency()
        needed = rows.needed("clip")
        for clip in dict.fromkeys([*needed, *rows.clips]):
            prepared = self.worker.prepare_now(clip)
            if prepared.error and clip in needed:
                raise RuntimeError(f"the live release cannot be loaded: {prepared.error}")

    async def encode(self, kind: Kind, payload: Any, adapter: str | None, deadline: float) -> EncodeResult:
        """Vectors of one request's items; batched with those of other requests."""
        self._inside += 1
        self._record_load()
        try:
            answer: EncodeResult = await self.batch(EncodeRequest(kind, payload, adapter, deadline))
            return answer
        finally:
            self._inside -= 1
            self._record_load()

    @serve.batch(max_batch_size=16 * IMAGE_COST, batch_wait_timeout_s=0.005, batch_size_fn=batch_cost)  # type: ignore[untyped-decorator]
    async def batch(self, works: list[EncodeRequest]) -> list[EncodeResult]:
        """One dynamic batch, bounded by cost."""
        self._running = len(works)
        self._record_load()
        try:
            return await self.worker.encode(works)
        finally:
            self._running = 0
            self._record_load()

    async def encode_background(self, kind: Kind, payload: Any, adapter: str | None) -> EncodeResult:
        """Vectors for the catalog and for comparisons, at low priority."""
        return await self.worker.encode_background(kind, payload, adapter)

    async def prepare(self, clip: str | None) -> Prepared:
        """Phase one of a release; see :meth:`EncoderWorker.prepare`."""
        return await self.worker.prepare(clip)

    async def adopt(self, clips: Sequence[str | None]) -> str:
        """The controller committed: these adapters are resident, the live one first."""
        self._follower.mark_in_step()
        return self.worker.replica

    async def retire(self, keep: Sequence[str | None]) -> list[str]:
        """Unload what left the rollback window."""
        return self.worker.retire(keep)

    async def check_health(self) -> None:
        """Serve asks this every few seconds. Starts the follower, and raises when this replica lags behind for long."""
        await self._follower.check()

    def _residency(self) -> ResidencyRows:
        return read_residency(self.ledger, self.settings.serve.rollback_window)

    def _record_load(self) -> None:
        metrics.encoder.inside(min(self._running, self._inside), max(0, self._inside - self._running))

    async def _load(self, rows: ResidencyRows) -> list[Prepared]:
        return [await self.worker.prepare(clip) for clip in rows.needed("clip")]
