"""VLM replicas: the Ray shell around :class:`serving.replicas.vlm_worker.VlmWorker` and an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve

from ops import metrics
from ops.artifacts import Artifacts
from ops.ledger import Ledger
from ops.settings import Settings
from serving.engines.vlm.base import load_vlm_base
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.messages import Refusal
from serving.ray.loopback import close_replica_port
from serving.releases.residency import ResidencyRows, read_residency
from serving.releases.types import Prepared
from serving.replicas.follower import ResidencyFollower
from serving.replicas.vlm_worker import VlmWorker

INCOMING, LATE = 1, 1
"""Places for adapters beside those of the resident releases: one that is being prepared, one for late requests."""


class VlmReplica:
    """Holds one engine, and the adapters of the resident releases. Healthy only when the live one is loaded.

    A dead engine cannot be started again in its process: the replica reports it, and Serve starts another replica.
    """

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it
        close_replica_port()
        metrics.build.started("vlm")
        from serving.engines.vlm.open import open_engine  # sets what vLLM reads at import

        self.settings = settings
        self.ledger = Ledger.open(settings.ledger, migrate=False)
        engine = open_engine(load_vlm_base(settings.home, settings.base.vlm), settings.serve)
        await engine.start()
        self.worker = VlmWorker(
            engine, Artifacts(settings.artifacts), serve.get_replica_context().replica_tag,
            settings.serve.rollback_window + INCOMING + LATE, settings.serve.vlm_batch,
        )  # fmt: skip
        self._follower = ResidencyFollower("vlm", self._residency, self._load)
        rows = self._residency()
        wanted, needed = rows.vlms or (None,), rows.needed("vlm")
        self.worker.adopt(wanted)
        for vlm in wanted:
            prepared = await self.worker.prepare(vlm)
            if prepared.error and vlm in needed:
                await engine.close()
                raise RuntimeError(f"the live release cannot be loaded: {prepared.error}")

    async def __del__(self) -> None:
        """Serve awaits this when the replica ends: the engine's processes end with it."""
        await self.worker.engine.close()

    async def reply(
        self, request: GenerationRequest, adapter: str | None, deadline: float
    ) -> GenerationResult | Refusal:
        """The whole answer; see :meth:`VlmWorker.reply`."""
        return await self.worker.reply(request, adapter, deadline)

    async def stream(
        self, request: GenerationRequest, adapter: str | None, deadline: float
    ) -> AsyncIterator[TokenChunk | Refusal]:
        """Pieces of the answer; see :meth:`VlmWorker.stream`."""
        async for chunk in self.worker.stream(request, adapter, deadline):
            yield chunk

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], adapter: str | None, deadline: float
    ) -> list[float] | Refusal:
        """Log-probabilities of choices; see :meth:`VlmWorker.score`."""
        return await self.worker.score(request, choices, adapter, deadline)

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
        if trouble := self.worker.engine.trouble():
            raise RuntimeError(f"the engine is dead: {trouble}")
        await self._follower.check()

    def _residency(self) -> ResidencyRows:
        return read_residency(self.ledger, self.settings.serve.rollback_window)

    async def _load(self, rows: ResidencyRows) -> list[Prepared]:
        prepared = [await self.worker.prepare(vlm) for vlm in rows.needed("vlm")]
        if not any(each.error for each in prepared):
            self.worker.adopt(rows.vlms or (None,))
        return prepared
