"""The catalog deployment: the Ray shell around :class:`serving.catalog.catalog.Catalog`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from ray.serve.handle import DeploymentHandle

from core import metrics
from core.errors import LedgerError, RatchetError, StoreError
from core.ledger import Ledger
from core.ledger.leases import CONTROLLER_LEASE
from core.settings import Settings
from core.tracing import span
from serving.catalog.cross_version import CrossVersionVerdicts, usable
from serving.catalog.queries import Found, Search
from serving.messages import EncodeResult
from serving.ray.replica_process import begin_replica, freeze_gc, keep_running
from serving.releases.leadership import spaces_of_bases
from serving.releases.types import ReleaseSnapshot
from serving.replicas.follower import residency_reader, wait_for_clip

if TYPE_CHECKING:
    from serving.catalog.catalog import Catalog

log = logging.getLogger("ratchet.catalog")
HEALTH_SECONDS = 10.0
FOLLOW_SECONDS = 2.0
MOST_WAIT_SECONDS = 600.0
"""Longest wait of a release for its catalog, if its verdict allows searches before it is complete."""


class CatalogReplica:
    """One replica in a server. Another server may have its own on the same tables."""

    async def __init__(self, settings: Settings, encoder: DeploymentHandle) -> None:  # type: ignore[misc]  # awaited
        begin_replica(settings, "catalog")
        await wait_for_clip()
        # Here and not above: Lance and faiss take two seconds to import.
        from serving.catalog.catalog import Catalog
        from serving.catalog.tables import Tables
        from serving.catalog.watch import Watcher
        from serving.engines.clip_base import load_base
        from streams.store.sample_store import SampleStore

        preprocess = load_base(settings.home, settings.base.clip).preprocess

        async def encode(batch: npt.NDArray[np.uint8], clip: str | None) -> npt.NDArray[np.float32]:
            answer: EncodeResult = await encoder.encode_background.remote("image", batch, clip)
            if answer.vectors is None:
                raise StoreError(f"the catalog cannot be embedded with {clip or 'the base'}: {answer.error}")
            return answer.vectors

        tables = Tables(f"{settings.lake}/catalog", settings.home / "catalog-index")
        self.catalog = Catalog(tables, SampleStore(settings.lake), preprocess.pixels, encode, settings.catalog)
        self._ledger = Ledger.lazy(settings.ledger)
        self._home = settings.home
        self._residency_reader = residency_reader(settings, self._ledger, encoder, "catalog")
        self._watcher = Watcher(self.catalog, settings.watch)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._adopting = asyncio.Lock()
        self._verdicts = CrossVersionVerdicts(self._ledger)
        self._adopted = 0
        freeze_gc()

    def __del__(self) -> None:
        """Serve calls this when the replica ends: its tables may be dropped from now on."""
        if (catalog := getattr(self, "catalog", None)) is not None:
            with contextlib.suppress(OSError):
                catalog.claims.close()

    async def _started(self) -> Catalog:
        """The catalog with its loops running and a residency adopted, which a replaced replica has not been told."""
        keep_running(
            self._tasks, {"reconcile": self.catalog.run, "watch": self._watcher.run, "follow": self._follow_ledger}
        )
        if not self._adopted:
            await self._catch_up()
        return self.catalog

    async def _catch_up(self) -> None:
        """Adopt what was not announced: what is live at the start, offline releases, and those of other servers."""
        async with self._adopting:
            residency = await self._residency_reader.read(newer_than=self._adopted)
            if residency is not None:
                await self._adopt(residency.indexed)

    async def _follow_ledger(self) -> None:
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            await self._try_to_catch_up()

    async def _try_to_catch_up(self) -> None:
        try:
            await self._catch_up()
        except Exception as error:
            log.warning("cannot follow the ledger: %s: %s", type(error).__name__, error)

    async def check_health(self) -> None:
        """Serve asks this every few seconds. An encoder that does not answer yet does not get this replica replaced."""
        try:
            async with asyncio.timeout(HEALTH_SECONDS):
                await self._started()
        except Exception as error:
            log.warning("the catalog does not know what is live yet: %s: %s", type(error).__name__, error)

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool) -> int | str:
        """See :meth:`Catalog.cover`; a string is the reason of a failure."""
        try:
            catalog = await self._started()
            if wait:
                await self._learn_cross_version([snapshot])
            at_once = usable(catalog.cross_version, snapshot.image_space, catalog.reconciler.complete()) is not None
            return await catalog.cover(snapshot, wait, MOST_WAIT_SECONDS if at_once else None)
        except RatchetError as error:
            return str(error)

    async def adopt(self, window: Sequence[ReleaseSnapshot]) -> None:
        await self._adopt(window)
        await self._started()

    async def _adopt(self, window: Sequence[ReleaseSnapshot]) -> None:
        await self.catalog.adopt(window)
        self._verdicts.remember(window)
        self._tasks["learn"] = asyncio.create_task(self._learn_cross_version(window))  # no rollback waits for it
        if window:
            self._adopted = max(self._adopted, window[0].release)
            metrics.release.live("catalog", self._adopted)

    async def _learn_cross_version(self, snapshots: Sequence[ReleaseSnapshot]) -> None:
        self.catalog.cross_version |= await self._verdicts.read(snapshots, self.catalog.reconciler.complete())

    async def retire(self, keep: Sequence[ReleaseSnapshot], epoch: int | None) -> list[str]:
        """See :meth:`Catalog.retire`. No table is dropped without ``epoch`` (of the controller's lease), after another
        controller took over, or while the ledger is away."""
        catalog = await self._started()
        return await catalog.retire(keep, None if epoch is None else await asyncio.to_thread(self._spared, epoch))

    def _spared(self, epoch: int) -> set[str] | None:
        """Image spaces of proposed releases, whose embeddings survive a restart, and of the newest release of each
        base; None without the lease."""
        try:
            lease = self._ledger.lease(CONTROLLER_LEASE)
            if lease is None or lease.epoch != epoch:
                return None
            proposals = self._ledger.pending_proposals()
            proposed = {self._ledger.adapter(each.clip).image_space for each in proposals if each.clip is not None}
            return proposed | spaces_of_bases(self._ledger, self._home)
        except LedgerError as error:
            log.warning("no table is dropped while the ledger is away: %s", error)
            return None

    async def search(self, space: str, search: Search) -> Found | str:
        """See :meth:`Catalog.search`; a string is the reason of a failure."""
        try:
            catalog = await self._started()
            if space not in catalog.reconciler.fills:  # the ingress learned of another server's release first
                await self._try_to_catch_up()
            with span("search", k=search.k, queries=len(search.queries)):
                return await catalog.search(space, search)
        except RatchetError as error:
            return str(error)

    async def image(self, sample_id: str) -> bytes | str | None:
        try:
            return await (await self._started()).image(sample_id)
        except RatchetError as error:
            return str(error)

    async def status(self) -> dict[str, Any]:
        return (await self._started()).status()
