"""The ingress deployment: the HTTP application, and the live pointer that requests are stamped with."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from core import metrics
from core.access import Access
from core.ledger import Ledger
from core.settings import Settings
from serving.engines.clip_base import base_directory, load_base
from serving.engines.vlm.vlm_base import MODEL
from serving.http.app import build_app
from serving.http.app_state import AppState
from serving.http.deletion_service import DeletionService
from serving.http.image_loader import ImageLoader
from serving.http.quarantine_service import QuarantineService
from serving.http.receipt_service import ReceiptService
from serving.http.replica_share import share_of
from serving.http.token_texts import token_texts
from serving.messages import EncodeResult, Modality
from serving.own_threads import OwnThreads
from serving.ray.deployment_status import DeploymentStatus, read_statuses
from serving.ray.loopback import close_replica_port
from serving.ray.ray_session import proxies
from serving.ray.replica_logs import configure_replica_logging
from serving.ray.settled import settle
from serving.releases.admission import Admission
from serving.releases.agreement import TEXTS
from serving.releases.broadcast import APP, VLM
from serving.releases.guard import find_guard_target
from serving.releases.observations import Observations
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.shadow_traffic import ShadowTraffic
from serving.replicas.catalog_calls import CatalogCalls
from serving.replicas.controller_calls import ControllerCalls
from serving.replicas.encoder_calls import EncoderCalls
from serving.replicas.follower import residency_reader
from serving.replicas.key_copy import KeyCopy
from serving.replicas.mirrored_calls import MirroredEncoders, MirroredVlms
from serving.replicas.vlm_calls import VlmCalls
from serving.replicas.vlm_start import VlmStart

log = logging.getLogger("ratchet.ingress")
SWITCH_SECONDS = 0.001
"""After so long a thread that computes in Python lets another one on (0.005 by default). Those that decode have a low
priority: beside busy encoders 5 ms of theirs take 50, for which the event loop would wait several times a request."""
FOLLOW_SECONDS = 1.0
KEYS_SECONDS = 10.0
"""How often keys are read though nobody calls, so that the copies of them are not older than this."""
FIRST_SECONDS = 20.0
"""How long a replica that starts waits for the ledger and the encoders; after that it refuses until it knows."""


def read_vlm_status() -> DeploymentStatus | None:
    """What Serve knows of the VLM; None before it has made the deployment."""
    return read_statuses(APP).get(VLM)


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
        sys.setswitchinterval(SWITCH_SECONDS)
        configure_replica_logging(settings, "ingress")
        metrics.build.started("ingress")
        self.settings = settings
        self.ledger = Ledger.lazy(settings.ledger)
        self.residency_reader = residency_reader(settings, self.ledger, encoder, "ingress")
        base = load_base(settings.home, settings.base.clip)
        self.admission = Admission()
        self.key_copy = KeyCopy.of(settings)
        self.access = Access(self.ledger, settings, recall=self.key_copy.read)
        self.access.refresh()  # so that keys are known even if the ledger goes away before the first request
        self._keys, self._watching = OwnThreads("keys"), OwnThreads("guard-target")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        encoders = EncoderCalls(encoder, settings.serve.max_batch)
        share = share_of(settings.serve)
        vlms = None if vlm is None else VlmCalls(vlm, share.vlm_queue)
        self.vlm_start = None if vlm is None else VlmStart(vlm.status.remote, read_vlm_status)

        async def unhurried(kind: Modality, payload: Any, adapter: str | None) -> EncodeResult:
            answer: EncodeResult = await encoder.encode_background.remote(kind, payload, adapter)
            return answer

        tokenizer = base.tokenizer()
        self.shadow_traffic = ShadowTraffic(
            settings.rollout, unhurried, tokenizer.rows(list(TEXTS)), vlms, settings.serve.deadline_seconds
        )
        self.app_state = AppState(
            settings=share,
            dim=base.dim,
            tokenizer=tokenizer,
            admission=self.admission,
            encoders=MirroredEncoders(encoders, self.shadow_traffic),
            index=CatalogCalls(catalog, settings.serve.deadline_seconds),
            operations=ControllerCalls(controller),
            image_loader=ImageLoader(base.preprocess, share),
            access=self.access,
            quarantine=QuarantineService(settings, self.ledger),
            receipts=ReceiptService(settings),
            deletions=DeletionService(settings, self.ledger),
            ledger=self.ledger,
            refresh=self.refresh,
            vlms=(
                None
                if vlms is None or self.vlm_start is None
                else MirroredVlms(vlms, self.shadow_traffic, self.vlm_start)
            ),
            proxies=proxies(settings.serve),
            token_text=token_texts(None if vlm is None else base_directory(settings.home, settings.base.vlm) / MODEL),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = build_app(self.app_state)
        settle()
        return app

    async def adopt(self, window: Sequence[ReleaseSnapshot]) -> int:
        """Stamp requests with these releases from the next one on; the newest is live."""
        number = self.admission.adopt(window)
        metrics.release.live("ingress", number)
        return number

    async def resident(self) -> tuple[ReleaseSnapshot, ...]:
        """The releases that requests may name here, newest first."""
        return self.admission.window

    async def in_flight(self) -> dict[int, int]:
        """Requests being answered, by release."""
        return self.admission.in_flight()

    async def drain(self) -> dict[int, int]:
        """Admit no more requests; how many are being answered, by release."""
        self.admission.close()
        return self.admission.in_flight()

    async def observations(self) -> Observations:
        """What was seen of the release that is watched; the controller adds it up over replicas."""
        return self.shadow_traffic.observations(self.admission.answered())

    async def check_health(self) -> None:
        """Serve asks this once before it sends requests here, and every few seconds after that. Keeps the follower, the
        comparisons, the copy of the keys and the metric of what answers running, and waits for the VLM's start.
        """
        if not self._tasks:
            await asyncio.gather(self._adopt_first(), *([self.vlm_start.look()] if self.vlm_start is not None else []))
        work_by_name = {
            "follow": self._follow, "compare": self.shadow_traffic.run, "keys": self._read_keys,
            "probe": self.app_state.probes.watch,
        }  # fmt: skip
        if self.vlm_start is not None:
            work_by_name["vlm"] = self.vlm_start.run
        for name, work in work_by_name.items():
            if name not in self._tasks or self._tasks[name].done():
                self._tasks[name] = asyncio.get_running_loop().create_task(work())

    async def refresh(self) -> None:
        """Adopt what the ledger says."""
        live = self.admission.live
        residency = await self.residency_reader.read(newer_than=live.release if live else 0)
        if residency is not None:
            await self.adopt(residency.window)

    async def _adopt_first(self) -> None:
        """Know what is live before the first request comes: one that replaces another takes its requests at once."""
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                await self.refresh()
        except Exception as error:
            log.warning("what is live is not known yet: %s: %s", type(error).__name__, error)

    async def _follow(self) -> None:
        while True:
            try:
                await self.refresh()
                self.shadow_traffic.watch(
                    await self._watching.run(find_guard_target, self.ledger, self.settings.rollout, time.time())
                )
            except Exception as error:  # the ledger or the encoders are away: serve on with what is known
                log.warning("cannot follow the ledger: %s: %s", type(error).__name__, error)
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _read_keys(self) -> None:
        while True:
            await self._keys.run(self.access.refresh)
            if (keys := self.access.current()) is not None:
                await self._keys.run(self.key_copy.keep, keys)
            await asyncio.sleep(KEYS_SECONDS)
