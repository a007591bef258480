"""VLM replicas: the Ray shell around :class:`serving.replicas.vlm_worker.VlmWorker` and an engine."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve

from core import metrics
from core.artifacts import Artifacts
from core.ledger import Ledger
from core.priority import nice_process
from core.request_context import note
from core.settings import Settings
from core.tracing import record, span
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.messages import VLM_NICE, Refusal
from serving.ray.replica_process import close_replica_port, configure_replica_logging, settle
from serving.releases.residency import ResidencyRows, ResidencySource
from serving.releases.types import BASE, Prepared
from serving.replicas.adapter_cache import AdapterCache, adapters_path
from serving.replicas.follower import ResidencyFollower, check_start, wait_for_clip

log = logging.getLogger("ratchet.vlm")
INCOMING, LATE = 1, 1
"""Places for adapters beside those of the resident releases: one that is being prepared, one for late requests."""
RETRY_SECONDS = 15.0
"""Between a start that failed and the next one. Serve itself would begin again at once, and load all cores for ever."""


class VlmReplica:
    """Holds one engine, and the adapters of the resident releases. Starts as an encoder does, but after CLIP.

    A dead engine cannot be started again in its process: the replica reports it, and Serve starts another replica. One
    whose start fails is started again without end, see :data:`serving.ray.ray_session.START_ATTEMPTS`.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        close_replica_port()
        nice_process(VLM_NICE)
        configure_replica_logging(settings, "vlm")
        metrics.build.started("vlm")
        await wait_for_clip()
        try:
            await self._start(settings)
        except Exception:
            log.exception("the VLM cannot start")
            await asyncio.sleep(RETRY_SECONDS)
            raise
        settle()

    async def _start(self, settings: Settings) -> None:
        from serving.engines.vlm.open import open_engine  # sets what vLLM reads at import
        from serving.engines.vlm.vlm_base import load_vlm_base
        from serving.replicas.vlm_worker import VlmWorker

        self.settings = settings
        ledger = Ledger.lazy(settings.ledger)
        self._adapters = AdapterCache(Artifacts(settings.artifacts), adapters_path(settings.home), ledger)
        self._source = ResidencySource.of(settings, ledger, "vlm", self._adapters.digests)
        engine = open_engine(load_vlm_base(settings.home, settings.base.vlm), settings.serve)
        await engine.start()
        self.worker = VlmWorker(
            engine, self._adapters, serve.get_replica_context().replica_tag,
            settings.serve.rollback_window + INCOMING + LATE, settings.serve.vlm_batch, settings.serve.deadline_seconds,
        )  # fmt: skip
        self._follower = ResidencyFollower("vlm", self._source.read, self._load, self._source.keep)
        try:
            rows = await asyncio.to_thread(self._source.newest)
            self._adapters.expect(self._source.adapters)
            wanted = rows.vlms or (None,)
            self.worker.adopt(wanted)
            check_start([await self.worker.prepare(vlm) for vlm in wanted], rows.needed("vlm"))
        except Exception:
            await engine.close()
            raise

    async def __del__(self) -> None:
        """Serve awaits this when the replica ends: the engine's processes end with it."""
        if (worker := getattr(self, "worker", None)) is not None:  # it may have failed to start
            await worker.engine.close()

    async def reply(
        self, request: GenerationRequest, adapter: str | None, seconds: float
    ) -> GenerationResult | Refusal:
        """The whole answer; see :meth:`VlmWorker.reply`."""
        note(adapter or BASE)
        with span("engine"):
            return await self.worker.reply(request, adapter, seconds)

    async def probe(self, adapter: str | None, seconds: float) -> GenerationResult | Refusal:
        """Whether it answers; see :meth:`VlmWorker.probe`."""
        return await self.worker.probe(adapter, seconds)

    async def stream(
        self, request: GenerationRequest, adapter: str | None, seconds: float
    ) -> AsyncIterator[TokenChunk | Refusal]:
        """Chunks of the answer; see :meth:`VlmWorker.stream`."""
        note(adapter or BASE)
        began = time.monotonic()
        try:
            async for chunk in self.worker.stream(request, adapter, seconds):
                yield chunk
        finally:
            record("engine", began, time.monotonic())

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], adapter: str | None, seconds: float
    ) -> list[float] | Refusal:
        """Log-probabilities of choices; see :meth:`VlmWorker.score`."""
        note(adapter or BASE)
        with span("engine", choices=len(choices)):
            return await self.worker.score(request, choices, adapter, seconds)

    async def prepare(self, vlm: str | None) -> Prepared:
        """Phase one of a release; see :meth:`VlmWorker.prepare`."""
        return await self.worker.prepare(vlm)

    async def adopt(self, vlms: Sequence[str | None]) -> str:
        """The controller committed: these adapters are resident, the live one first."""
        self._follower.mark_in_step()
        return self.worker.adopt(vlms)

    async def retire(self, vlms: Sequence[str | None]) -> list[str]:
        """Unload all others."""
        return await self.worker.retire(vlms)

    async def status(self) -> dict[str, Any]:
        """Engine, adapters, and requests inside."""
        return self.worker.status()

    async def check_health(self) -> None:
        """Serve asks this every few seconds. Raises when the engine is dead, or lags behind for long."""
        if last_error := self.worker.engine.last_error():
            raise RuntimeError(f"the engine is dead: {last_error}")
        await self.worker.check_health()
        await self._follower.check()

    async def _load(self, rows: ResidencyRows) -> list[Prepared]:
        self._adapters.protect([*rows.clips, *rows.vlms])
        prepared = [await self.worker.prepare(vlm) for vlm in rows.needed("vlm")]
        if not any(each.error for each in prepared):
            self.worker.adopt(rows.vlms or (None,))
        return prepared
