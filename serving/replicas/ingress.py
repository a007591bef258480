"""The ingress deployment: the HTTP application, and the live pointer that requests are stamped with."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from ops import metrics
from ops.access import Access
from ops.ledger import Family, Ledger
from ops.settings import Settings
from serving.engines.base import base_directory, load_base
from serving.engines.vlm.base import MODEL
from serving.http.app import build_app
from serving.http.app_state import AppState
from serving.http.deletion_service import DeletionService
from serving.http.image_loader import ImageLoader
from serving.http.quarantine_service import QuarantineService
from serving.http.receipt_service import ReceiptService
from serving.http.token_texts import token_texts
from serving.messages import EncodeResult, Kind
from serving.ray.loopback import close_replica_port
from serving.releases.admission import Admission
from serving.releases.broadcast import CatalogCalls
from serving.releases.controller import outcome_of
from serving.releases.guard_target import find_guard_target
from serving.releases.observations import Observations
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.rollback import Adapters
from serving.releases.shadow_traffic import ShadowTraffic
from serving.releases.types import Outcome
from serving.releases.window import ResidencyReader
from serving.replicas.encoder_calls import EncoderCalls
from serving.replicas.mirrored_calls import MirroredEncoders, MirroredVlms
from serving.replicas.vlm_calls import VlmCalls

log = logging.getLogger("ratchet.ingress")
FOLLOW_SECONDS = 1.0


class ControllerCalls:
    """Implements :class:`serving.http.app_state.Operations`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self.handle = handle

    async def release(
        self, adapters: Adapters, *, actor: str, reason: str, expected_live: int, share: float, force: bool
    ) -> Outcome:
        """Release adapters by family."""
        with metrics.operator.action("release"):
            found: Outcome = outcome_of(
                await self.handle.release.remote(
                    dict(adapters), actor=actor, reason=reason, expected_live=expected_live, share=share, force=force
                )
            )
        return found

    async def promote(self, *, actor: str, reason: str, expected_live: int) -> Outcome:
        """Let what is on trial answer everybody."""
        with metrics.operator.action("promote"):
            found: Outcome = outcome_of(
                await self.handle.promote.remote(actor=actor, reason=reason, expected_live=expected_live)
            )
        return found

    async def rollback(
        self, *, actor: str, reason: str, expected_live: int, to: int | None, family: Family | None
    ) -> Outcome:
        """Release what was live before."""
        with metrics.operator.action("rollback"):
            found: Outcome = outcome_of(
                await self.handle.rollback.remote(
                    actor=actor, reason=reason, expected_live=expected_live, to=to, family=family
                )
            )
        return found

    async def hold(self, *, actor: str, reason: str) -> None:
        """Let updates wait."""
        with metrics.operator.action("hold"):
            outcome_of(await self.handle.hold.remote(actor=actor, reason=reason))

    async def resume(self, *, actor: str, reason: str) -> None:
        """Let updates through."""
        with metrics.operator.action("resume"):
            outcome_of(await self.handle.resume.remote(actor=actor, reason=reason))

    async def status(self) -> dict[str, Any]:
        """What the controller does."""
        found: dict[str, Any] = await self.handle.status.remote()
        return found


@serve.ingress()
class Ingress:
    """Told of releases by the controller; looks at the ledger itself as a safety net."""

    def __init__(
        self,
        settings: Settings,
        encoder: DeploymentHandle,
        catalog: DeploymentHandle,
        controller: DeploymentHandle,
        vlm: DeploymentHandle | None = None,
    ) -> None:
        close_replica_port()
        metrics.build.started("ingress")
        self.settings = settings
        self.ledger = Ledger.open(settings.ledger, migrate=False)
        self.window = ResidencyReader(self.ledger, encoder, settings.serve.rollback_window)
        base = load_base(settings.home, settings.base.clip)
        self.admission = Admission()
        self.access = Access(self.ledger, settings)
        self.access.refresh()  # so that keys are known even if the ledger goes away before the first request
        self._tasks: dict[str, asyncio.Task[None]] = {}
        encoders = EncoderCalls(encoder, settings.serve.max_batch)
        vlms = None if vlm is None else VlmCalls(vlm, settings.serve.vlm_queue)

        async def unhurried(kind: Kind, payload: Any, adapter: str | None) -> EncodeResult:
            answer: EncodeResult = await encoder.encode_background.remote(kind, payload, adapter)
            return answer

        self.shadow_traffic = ShadowTraffic(settings.rollout, unhurried, vlms, settings.serve.deadline_seconds)
        self.app_state = AppState(
            settings=settings.serve,
            dim=base.dim,
            admission=self.admission,
            encoders=MirroredEncoders(encoders, self.shadow_traffic),
            index=CatalogCalls(catalog, settings.serve.deadline_seconds),
            operations=ControllerCalls(controller),
            image_loader=ImageLoader(base.preprocess, settings.serve),
            access=self.access,
            quarantine=QuarantineService(settings, self.ledger),
            receipts=ReceiptService(settings),
            deletions=DeletionService(settings, self.ledger),
            ledger=self.ledger,
            refresh=self.refresh,
            vlms=None if vlms is None else MirroredVlms(vlms, self.shadow_traffic),
            token_text=token_texts(None if vlm is None else base_directory(settings.home, settings.base.vlm) / MODEL),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self.app_state)

    async def adopt(self, window: Sequence[ReleaseSnapshot]) -> int:
        """The controller's word: these releases are resident, the newest is live. From the next request on."""
        number = self.admission.adopt(window)
        metrics.release.live("ingress", number)
        return number

    async def in_flight(self) -> dict[int, int]:
        """Requests being answered, by release."""
        return self.admission.in_flight()

    async def observations(self) -> Observations:
        """What was seen of the release that is watched; the controller adds it up over replicas."""
        return self.shadow_traffic.observations(self.admission.answered())

    async def check_health(self) -> None:
        """Keeps the follower and the comparisons running."""
        for name, work in (("follow", self._follow), ("compare", self.shadow_traffic.run)):
            if name not in self._tasks or self._tasks[name].done():
                self._tasks[name] = asyncio.get_running_loop().create_task(work())

    async def refresh(self) -> None:
        """Adopt what the ledger says."""
        live = self.admission.live
        resident = await self.window.read(newer_than=live.release if live else 0)
        if resident is not None:
            await self.adopt(resident.window)

    async def _follow(self) -> None:
        while True:
            try:
                await self.refresh()
                self.shadow_traffic.watch(
                    await asyncio.to_thread(find_guard_target, self.ledger, self.settings.rollout, time.time())
                )
            except Exception as error:  # the ledger or the encoders are away: serve on with what is known
                log.warning("cannot follow the ledger: %s: %s", type(error).__name__, error)
            await asyncio.sleep(FOLLOW_SECONDS)
