"""The replicas behind Ray handles: broadcasts that reach every one, and calls to the catalog.

After a commit :class:`Announcer` tells whoever answers in a short time, then whoever did not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

from ray import serve
from ray.serve.handle import DeploymentHandle

from core.errors import ReleaseError
from serving.own_threads import BoundedCall
from serving.ray.deployment_status import read_statuses
from serving.ray.replica_calls import Attempts, call_every_replica, call_replica
from serving.releases.observations import Observations
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.types import NO_VLM, Broadcast, Prepared, Residency

log = logging.getLogger("ratchet.broadcast")
APP = "ratchet"
INGRESS = "Ingress"
VLM = "Vlm"
PREPARE_SECONDS = 300.0
ACKNOWLEDGE_SECONDS = 10.0
COVER_SECONDS, ASK_COVER_SECONDS = 7 * 86_400.0, 30.0
"""To embed a whole catalog, and to ask for it. A million images take hours; the catalog itself gives up when a backfill
stands still (:data:`serving.catalog.catalog.STALL_SECONDS`)."""
RETIRE_SECONDS = 60.0
RESIDENT_SECONDS = 0.2
"""Asked for when a rollback comes before this process knows the embedding spaces."""
STATUS_SECONDS = 2.0
VLM_RETIRE_SECONDS = 2.0
"""A VLM takes a minute to start, and starts with nothing to unload: releases of CLIP do not wait for it."""
ROLLBACK_SECONDS: Final = 0.3
"""For a rollback. Replicas that answer take some 10 ms; those that do not may be starting, stuck or dead. The message
is on its way to them all the same, they look at the ledger by themselves every second or two, and they are told again.
"""
RELEASE_SECONDS: Final = 10.0
"""For other releases: the operator's call returns when every replica serves the release."""
HEAL_ATTEMPTS: Final = 6
HEAL_PAUSE_SECONDS: Final = 2.0


class RayBroadcast:
    """Implements :class:`serving.releases.types.Broadcast`."""

    def __init__(self, encoder: DeploymentHandle, catalog: DeploymentHandle, vlm: DeploymentHandle | None) -> None:
        self.encoder = encoder
        self.catalog = catalog
        self.vlm = vlm
        self._announced_vlms: tuple[str | None, ...] | None = None
        """None until the first announcement, which VLM replicas need not hear: they start by what the ledger says."""
        self._ingress: DeploymentHandle | None = None
        self._statuses = BoundedCall(lambda: read_statuses(APP), STATUS_SECONDS)

    @property
    def ingress(self) -> DeploymentHandle:
        """The ingress depends on the controller, so its handle is looked up late."""
        if self._ingress is None:
            self._ingress = serve.get_deployment_handle(INGRESS, APP)
        return self._ingress

    @property
    def has_vlm(self) -> bool:
        """Whether there are VLM replicas."""
        return self.vlm is not None

    async def prepare(self, clip: str | None) -> list[Prepared]:
        """Phase one, on every encoder."""
        return await call_every_replica(self.encoder, "prepare", clip, seconds=PREPARE_SECONDS)

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        """Phase one, on every VLM replica."""
        return await call_every_replica(self._vlm, "prepare", vlm, seconds=PREPARE_SECONDS)

    async def vlm_answers(self) -> bool:
        """Whether all VLM replicas that run answer, and there is one."""
        return bool(await self.vlm_status())

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool) -> int:
        """Coverage of the image space. Raises ReleaseError."""
        attempts = Attempts(COVER_SECONDS if wait else ASK_COVER_SECONDS, "catalog")
        rows: int | str = await call_replica(
            lambda: self.catalog.cover.remote(snapshot, wait), attempts, retry_full=True
        )
        if isinstance(rows, str):
            raise ReleaseError(f"the catalog cannot be brought up to date: {rows}")
        return rows

    async def resident(self) -> list[ReleaseSnapshot]:
        """What ingress replicas answer with at this moment; nothing where one does not say so at once."""
        try:
            windows = await call_every_replica(self.ingress, "resident", seconds=RESIDENT_SECONDS)
        except ReleaseError:
            return []
        return [snapshot for window in windows for snapshot in window]

    async def announce(self, residency: Residency, seconds: float) -> int:
        """What is resident to every replica; returns how many acknowledged.

        VLM replicas are told when their adapters change: one that starts makes no release of CLIP wait.

        Raises:
            ReleaseError: not every replica answered within ``seconds``.
        """
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
            raise _Unacknowledged("; ".join(str(error) for error in errors), acknowledged)
        self._announced_vlms = residency.vlms
        return acknowledged

    async def observations(self) -> list[Observations]:
        """What each ingress replica saw of the release that is watched."""
        return await call_every_replica(self.ingress, "observations", seconds=ACKNOWLEDGE_SECONDS)

    async def in_flight(self) -> dict[int, int]:
        """Requests being answered, over all ingress replicas."""
        total: dict[int, int] = {}
        for counts in await call_every_replica(self.ingress, "in_flight", seconds=ACKNOWLEDGE_SECONDS):
            for number, count in counts.items():
                total[number] = total.get(number, 0) + count
        return total

    async def retire_spaces(self, keep: Sequence[ReleaseSnapshot], epoch: int | None) -> None:
        """Before :meth:`retire`: while the catalog reconciles a space it needs that space's adapter."""
        await call_every_replica(self.catalog, "retire", list(keep), epoch, seconds=RETIRE_SECONDS)

    async def retire(self, clips: Sequence[str | None], vlms: Sequence[str | None]) -> None:
        """Encoders and VLM replicas unload all other adapters."""
        work = [call_every_replica(self.encoder, "retire", list(clips), seconds=RETIRE_SECONDS)]
        if self.vlm is not None:
            work.append(self._retire_vlms(vlms))
        await asyncio.gather(*work)

    async def replica_states(self) -> dict[str, dict[str, int]]:
        """Replicas of each deployment by Serve's state (``RUNNING``, ``STARTING``, ``STOPPING``); none while Serve does
        not say.
        """
        try:
            statuses = await asyncio.to_thread(self._statuses)
            return {name: dict(status.states) for name, status in statuses.items()}
        except Exception as error:
            log.info("the state of the replicas is not known: %s: %s", type(error).__name__, error)
            return {}

    async def encoder_status(self) -> list[dict[str, Any]]:
        """What each encoder says of itself: its engine, precision and base; none while one does not answer."""
        try:
            return await call_every_replica(self.encoder, "status", seconds=STATUS_SECONDS)
        except ReleaseError:
            return []

    async def vlm_status(self) -> list[dict[str, Any]]:
        """What each VLM replica says of itself; none while all of them are starting."""
        if self.vlm is None:
            return []
        try:
            return await call_every_replica(self.vlm, "status", seconds=STATUS_SECONDS)
        except ReleaseError:
            return []

    async def _retire_vlms(self, vlms: Sequence[str | None]) -> list[Any]:
        try:
            return await call_every_replica(self._vlm, "retire", list(vlms), seconds=VLM_RETIRE_SECONDS)
        except ReleaseError as error:
            log.info("a VLM replica is not there to unload adapters: %s", error)
            return []

    @property
    def _vlm(self) -> DeploymentHandle:
        if self.vlm is None:
            raise ReleaseError("no vision-language model is served here.", NO_VLM)
        return self.vlm


class _Unacknowledged(ReleaseError):
    """Not every replica acknowledged in time; ``acknowledged`` did."""

    def __init__(self, message: str, acknowledged: int) -> None:
        super().__init__(message, "Nothing needs to be done: a replica that was not reached follows the ledger.")
        self.acknowledged = acknowledged


class Announcer:
    """Announces releases that are committed; never fails. Use from one event loop."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._healing: asyncio.Task[None] | None = None

    async def announce(self, residency: Residency, seconds: float) -> int:
        """Tell every replica. Those that do not answer within ``seconds`` are told again in the background, until
        something else is announced. Returns how many acknowledged.
        """
        if self._healing is not None:
            self._healing.cancel()
            self._healing = None
        try:
            async with asyncio.timeout(2 * seconds):  # the broadcast keeps its time limit itself
                return await self._broadcast.announce(residency, seconds)
        except Exception as error:
            log.info("not every replica was reached: %s: %s", type(error).__name__, error)
            self._healing = asyncio.get_running_loop().create_task(self._heal(residency))
            return error.acknowledged if isinstance(error, _Unacknowledged) else 0

    async def _heal(self, residency: Residency) -> None:
        for _ in range(HEAL_ATTEMPTS):
            try:
                async with asyncio.timeout(2 * RELEASE_SECONDS):
                    await self._broadcast.announce(residency, RELEASE_SECONDS)
                return
            except Exception as error:
                log.info("a replica is told again: %s: %s", type(error).__name__, error)
            await asyncio.sleep(HEAL_PAUSE_SECONDS)
