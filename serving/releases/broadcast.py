"""The replicas behind Ray handles: broadcasts to all of them, and calls to the catalog."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from core.errors import ReleaseError
from serving.own_threads import BoundedCall
from serving.ray.deployment_status import read_statuses
from serving.ray.replica_calls import Attempts, call_every_replica, call_replica
from serving.releases.guard import Observations
from serving.releases.types import NO_VLM, Prepared, ReleaseSnapshot, Residency

log = logging.getLogger("ratchet.broadcast")
APP = "ratchet"
INGRESS = "Ingress"
VLM = "Vlm"
PREPARE_SECONDS = 300.0
ACKNOWLEDGE_SECONDS = 10.0
COVER_SECONDS, ASK_COVER_SECONDS = 7 * 86_400.0, 30.0
"""To embed a whole catalog (a million images take hours), and to request it. The catalog itself gives up when a
backfill stalls."""
RETIRE_SECONDS = 60.0
RESIDENT_SECONDS = 0.2
"""For a rollback that comes before this process knows the embedding spaces."""
STATUS_SECONDS = 2.0
VLM_RETIRE_SECONDS = 2.0
"""A VLM takes a minute to start, and starts with nothing to unload: releases of CLIP do not wait for it."""


class Unacknowledged(ReleaseError):
    """Not every replica acknowledged in time; ``acknowledged`` of them did."""

    def __init__(self, message: str, acknowledged: int) -> None:
        super().__init__(message, "Nothing needs to be done: a replica that was not reached follows the ledger.")
        self.acknowledged = acknowledged


class Broadcast:
    """The replicas, as the protocol needs them. Each call reaches every replica that runs at that moment."""

    def __init__(self, encoder: DeploymentHandle, catalog: DeploymentHandle, vlm: DeploymentHandle | None) -> None:
        self.encoder = encoder
        self.catalog = catalog
        self.vlm = vlm
        self._announced_vlms: tuple[str | None, ...] | None = None
        """None until the first announcement, which VLM replicas do not need: they start from the ledger."""
        self._statuses = BoundedCall(lambda: read_statuses(APP), STATUS_SECONDS)

    @cached_property
    def ingress(self) -> DeploymentHandle:
        """The ingress depends on the controller, so its handle is looked up late."""
        return serve.get_deployment_handle(INGRESS, APP)

    @property
    def has_vlm(self) -> bool:
        return self.vlm is not None

    async def prepare(self, clip: str | None) -> list[Prepared]:
        """Every encoder loads the adapter next to what it serves, and runs golden inputs."""
        return await call_every_replica(self.encoder, "prepare", clip, seconds=PREPARE_SECONDS)

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        if self.vlm is None:
            raise ReleaseError("no vision-language model is served here.", NO_VLM)
        return await call_every_replica(self.vlm, "prepare", vlm, seconds=PREPARE_SECONDS)

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool) -> int:
        """Complete the image space in the catalog, or only request it; returns its rows. Raises ReleaseError."""
        attempts = Attempts(COVER_SECONDS if wait else ASK_COVER_SECONDS, "catalog")
        rows: int | str = await call_replica(
            lambda: self.catalog.cover.remote(snapshot, wait), attempts, retry_full=True
        )
        if isinstance(rows, str):
            raise ReleaseError(f"the catalog cannot be brought up to date: {rows}")
        return rows

    async def resident(self) -> list[ReleaseSnapshot]:
        """The releases that ingress replicas answer with now; empty if one does not respond at once."""
        try:
            windows = await call_every_replica(self.ingress, "resident", seconds=RESIDENT_SECONDS)
        except ReleaseError:
            return []
        return [snapshot for window in windows for snapshot in window]

    async def announce(self, residency: Residency, seconds: float) -> int:
        """Tell every replica what is resident; returns how many acknowledged. VLM replicas are told only when their
        adapters change, so that one that starts does not delay releases of CLIP. Raises Unacknowledged when not every
        replica answered within ``seconds``."""
        messages: list[tuple[DeploymentHandle, list[Any]]] = [
            (self.ingress, list(residency.window)),
            (self.encoder, list(residency.clips)),
            (self.catalog, list(residency.indexed)),
        ]
        if self.vlm is not None and self._announced_vlms not in (None, residency.vlms):
            messages.append((self.vlm, list(residency.vlms)))
        answers = await asyncio.gather(
            *(call_every_replica(handle, "adopt", residents, seconds=seconds) for handle, residents in messages),
            return_exceptions=True,
        )
        acknowledged = sum(len(answer) for answer in answers if isinstance(answer, list))
        if errors := [answer for answer in answers if isinstance(answer, BaseException)]:
            raise Unacknowledged("; ".join(str(error) for error in errors), acknowledged)
        self._announced_vlms = residency.vlms
        return acknowledged

    async def observations(self) -> list[Observations]:
        """The counts of each ingress replica for the watched release."""
        return await call_every_replica(self.ingress, "observations", seconds=ACKNOWLEDGE_SECONDS)

    async def in_flight(self) -> dict[int, int]:
        """Requests in flight by release, over all ingress replicas."""
        total: Counter[int] = Counter()
        for counts in await call_every_replica(self.ingress, "in_flight", seconds=ACKNOWLEDGE_SECONDS):
            total.update(counts)
        return total

    async def retire_spaces(self, keep: Sequence[ReleaseSnapshot], epoch: int | None) -> None:
        """Make the catalog drop all other image spaces; their tables too, given the epoch of the controller's lease.
        Call before :meth:`retire`: the catalog needs a space's adapter while it reconciles it."""
        await call_every_replica(self.catalog, "retire", list(keep), epoch, seconds=RETIRE_SECONDS)

    async def retire(self, clips: Sequence[str | None], vlms: Sequence[str | None]) -> None:
        work = [call_every_replica(self.encoder, "retire", list(clips), seconds=RETIRE_SECONDS)]
        if self.vlm is not None:
            work.append(_retire_vlms(self.vlm, vlms))
        await asyncio.gather(*work)

    async def replica_states(self) -> dict[str, dict[str, int]]:
        """Replicas of each deployment by Serve's state (``RUNNING``, ``STARTING``, ``STOPPING``); empty if Serve does
        not answer."""
        try:
            statuses = await asyncio.to_thread(self._statuses)
            return {name: dict(status.states) for name, status in statuses.items()}
        except Exception as error:
            log.info("the state of the replicas is not known: %s: %s", type(error).__name__, error)
            return {}

    async def encoder_status(self) -> list[dict[str, Any]]:
        """Precision and base of each encoder; empty if one does not answer."""
        return await self._status(self.encoder)

    async def vlm_status(self) -> list[dict[str, Any]]:
        return [] if self.vlm is None else await self._status(self.vlm)

    async def _status(self, handle: DeploymentHandle) -> list[dict[str, Any]]:
        try:
            return await call_every_replica(handle, "status", seconds=STATUS_SECONDS)
        except ReleaseError:
            return []


async def _retire_vlms(handle: DeploymentHandle, vlms: Sequence[str | None]) -> list[Any]:
    try:
        return await call_every_replica(handle, "retire", list(vlms), seconds=VLM_RETIRE_SECONDS)
    except ReleaseError as error:
        log.info("a VLM replica is not there to unload adapters: %s", error)
        return []
