"""Encoder replicas: the Ray shell around :class:`serving.replicas.encoder_worker.EncoderWorker`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from ray import serve

from core import metrics
from core.artifacts import Artifacts
from core.ledger import Ledger
from core.priority import nice_process
from core.request_context import note
from core.settings import Settings
from serving.messages import IMAGE_COST, MODEL_NICE, EncodeRequest, EncodeResult, HeadsResult, Modality
from serving.ray.replica_process import close_replica_port, configure_replica_logging, settle
from serving.releases.residency import ResidencyRows, ResidencySource
from serving.releases.types import BASE, Prepared
from serving.replicas.adapter_cache import AdapterCache, adapters_path
from serving.replicas.fair_batches import FairBatches
from serving.replicas.follower import ResidencyFollower, check_start

if TYPE_CHECKING:
    from serving.engines.clip import ClipEngine

log = logging.getLogger("ratchet.encoder")
SHAPES = 64
"""Those of some 16 kinds of batches: a tower has four kinds of layers that multiply. Batches of ever new shapes took as
long with 64, 256 and 1,024; an encoder of 256 had 50 MB more, and grew for a quarter of an hour."""
VARIABLES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own, and that of ideep, through which torch calls it. Read once, when the first kernel is made."""


class Encoder:
    """Holds the base once, and the adapters of the resident releases. Starts from the last known residency while the
    ledger is away, and with the newest adapter that can be loaded where the live one's files are gone.
    """

    def __init__(self, settings: Settings) -> None:
        close_replica_port()
        nice_process(MODEL_NICE)
        configure_replica_logging(settings, "encoder")
        metrics.build.started("encoder")
        bound_kernel_caches()
        # Here and not above, because whoever deploys this class imports this module.
        from serving.replicas.encoder_worker import EncoderWorker

        self.settings = settings
        ledger = Ledger.lazy(settings.ledger)
        adapters = AdapterCache(Artifacts(settings.artifacts), adapters_path(settings.home), ledger)
        self._source = ResidencySource.of(settings, ledger, "encoder", adapters.digests)
        with ThreadPoolExecutor(1, "start") as starting:  # its OpenMP threads end with it: see EncoderWorker
            engine = starting.submit(self.make_engine, settings).result()
        self.worker = EncoderWorker(engine, adapters, serve.get_replica_context().replica_tag)
        self._batches = FairBatches(self._run, settings.serve.max_batch * IMAGE_COST, settings.serve.batch_wait_seconds)
        self._adapters = adapters
        self._follower = ResidencyFollower("encoder", self._source.read, self._load, self._source.keep)
        self._inside = self._running = 0
        rows = self._source.newest()
        adapters.expect(self._source.adapters)
        needed = rows.needed("clip")
        check_start(self.worker.prepare_at_start(dict.fromkeys([*needed, *rows.clips])), needed)
        settle()

    def make_engine(self, settings: Settings) -> ClipEngine:
        """What computes."""
        from serving.engines.clip import ClipEngine

        return ClipEngine.of(settings)

    async def encode(
        self, kind: Modality, payload: Any, adapter: str | None, caller: str, seconds: float
    ) -> EncodeResult:
        """Vectors of one request's items; batched with those of other requests, see :class:`FairBatches`. ``seconds``:
        time left.
        """
        deadline = time.monotonic() + seconds
        note(adapter or BASE)
        self._inside += 1
        self._record_load()
        try:
            if (refusal := await self.worker.load_missing(adapter)) is not None:
                return refusal
            result = await self._batches.submit(EncodeRequest(kind, payload, adapter, deadline, caller))
            if result.code == "failed":  # the batch's own line is of several requests
                log.warning("a request was not encoded: %s", result.error)
            return result
        finally:
            self._inside -= 1
            self._record_load()

    async def _run(self, requests: Sequence[EncodeRequest]) -> list[EncodeResult]:
        self._running = len(requests)
        self._record_load()
        try:
            return await self.worker.encode(requests)
        finally:
            self._running = 0
            self._record_load()

    async def encode_background(self, kind: Modality, payload: Any, adapter: str | None) -> EncodeResult:
        """Vectors for the catalog and for comparisons, at low priority."""
        return await self.worker.encode_background(kind, payload, adapter)

    async def heads(self, adapter: str | None) -> HeadsResult:
        """The heads of an adapter, which is loaded where it is not resident."""
        return await self.worker.heads(adapter)

    async def prepare(self, clip: str | None) -> Prepared:
        """Phase one of a release; see :meth:`EncoderWorker.prepare`."""
        return await self.worker.prepare(clip)

    async def adopt(self, clips: Sequence[str | None]) -> str:
        """The controller committed: these adapters are resident, the live one first."""
        self._follower.mark_in_step()
        return self.worker.replica

    async def retire(self, keep: Sequence[str | None]) -> list[str]:
        """Unload what left the rollback window."""
        return await self.worker.retire(keep)

    async def status(self) -> dict[str, Any]:
        """What this replica runs; see :meth:`EncoderWorker.status`."""
        return self.worker.status()

    async def check_health(self) -> None:
        """Serve asks this every few seconds. Starts the follower, and raises when this replica lags behind for long,
        or when its forward passes fail.
        """
        await self.worker.check_health()
        await self._follower.check()

    def _record_load(self) -> None:
        metrics.encoder.inside(min(self._running, self._inside), max(0, self._inside - self._running))

    async def _load(self, rows: ResidencyRows) -> list[Prepared]:
        self._adapters.protect([*rows.clips, *rows.vlms])
        return [await self.worker.prepare(clip) for clip in rows.needed("clip")]


def bound_kernel_caches() -> None:
    """Bound how many shapes oneDNN keeps kernels for. Call it before this process computes; a value in the environment
    stays.

    It makes a kernel for each shape of inputs, and keeps the last 1,024 of them and as many descriptions, up to 0.7 MB
    a pair. Batches of texts have more shapes than that: an encoder of 445 MB grew for a long time, to more than a
    gigabyte.
    """
    for name in VARIABLES:
        os.environ.setdefault(name, str(SHAPES))
