"""The ingress deployment: the HTTP application, and the releases that requests are bound to."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from tokenizers import Tokenizer

from core import metrics
from core.access import Access
from core.artifacts import Artifacts
from core.ledger import Ledger
from core.settings import Settings
from core.settings.serving import Serve
from serving.engines.clip_base import base_directory, load_base
from serving.engines.vlm.vlm_base import MODEL
from serving.http.answer_audits import AnswerAudits
from serving.http.answer_receipts import AnswerReceipts
from serving.http.app import build_app
from serving.http.app_state import AppState
from serving.http.auth import KeyCopy
from serving.http.calibrations import Calibrations
from serving.http.calls import CatalogCalls, ControllerCalls, VlmCalls
from serving.http.clip_vectors import EncoderCalls
from serving.http.image_loader import ImageLoader
from serving.http.store_services import DeletionService, FeedbackService, QuarantineService, ReceiptService
from serving.messages import EncodeResult, Modality
from serving.own_threads import OwnThreads
from serving.ray.deployment_status import read_statuses
from serving.ray.ray_session import proxies
from serving.ray.replica_process import begin_replica, freeze_gc, keep_running
from serving.releases.admission import Admission
from serving.releases.broadcast import APP, VLM
from serving.releases.guard import Observations, find_guard_target
from serving.releases.shadow_traffic import TEXTS, ShadowTraffic
from serving.releases.types import ReleaseSnapshot
from serving.replicas.follower import residency_reader

log = logging.getLogger("ratchet.ingress")
SWITCH_SECONDS = 0.001
"""GIL switch interval (default 0.005). Decoding threads have a low priority: next to busy encoders 5 ms of theirs take
50 ms, for which the event loop would wait several times a request."""
FOLLOW_SECONDS = 1.0
KEYS_SECONDS = 10.0
"""Between readings of the keys without requests, which bounds the age of their copies."""
FIRST_SECONDS = 20.0
"""Longest wait of a starting replica for the ledger and the encoders; then it starts, and refuses requests."""
SHARED = ("queue", "cache_bytes")
"""Limits that the ingress processes divide among them."""
_WORD_START = "\u2581"
"""SentencePiece's mark of a space before a word, which decoding a single token drops."""
_KEPT_TEXTS = 65_536


@serve.ingress()
class Ingress:
    """Gets releases from the controller, and reads the ledger as a safety net."""

    def __init__(
        self,
        settings: Settings,
        encoder: DeploymentHandle,
        catalog: DeploymentHandle,
        controller: DeploymentHandle,
        vlm: DeploymentHandle | None = None,
    ) -> None:
        begin_replica(settings, "ingress")
        sys.setswitchinterval(SWITCH_SECONDS)
        self.settings = settings
        self.ledger = Ledger.lazy(settings.ledger)
        self.residency_reader = residency_reader(settings, self.ledger, encoder, "ingress")
        base = load_base(settings.home, settings.base.clip)
        self.admission = Admission(settings.serve.aliases)
        self.key_copy = KeyCopy.of(settings)
        self.access = Access(self.ledger, settings, recall=self.key_copy.read)
        self.access.refresh()  # so that keys are known even if the ledger goes away before the first request
        self._keys, self._watching = OwnThreads("keys"), OwnThreads("guard-target")
        self._tasks: dict[str, asyncio.Task[None]] = {}
        share, vlm_share = share_of(settings.serve), -(-settings.serve.vlm_queue // settings.serve.ingress_replicas)
        self.vlms = None if vlm is None else VlmCalls(vlm, vlm_share, lambda: read_statuses(APP).get(VLM))

        async def unhurried(kind: Modality, payload: Any, adapter: str | None) -> EncodeResult:
            answer: EncodeResult = await encoder.encode_background.remote(kind, payload, adapter)
            return answer

        vlm_folder = None if vlm is None else base_directory(settings.home, settings.base.vlm) / MODEL
        tokenizer = base.tokenizer()
        answers = AnswerReceipts(settings.operator_key())
        self.shadow_traffic = ShadowTraffic(
            settings.rollout, unhurried, tokenizer.rows(list(TEXTS)), self.vlms, settings.serve.deadline_seconds
        )
        encoders = max(settings.serve.encoder_replicas, settings.serve.encoder_max_replicas)
        self.http_app = build_app(
            AppState(
                settings=share,
                dim=base.dim,
                tokenizer=tokenizer,
                admission=self.admission,
                encoders=EncoderCalls(encoder, settings.serve.max_batch, self.shadow_traffic, encoders),
                index=CatalogCalls(catalog, settings.serve.deadline_seconds),
                operations=ControllerCalls(controller),
                image_loader=ImageLoader(base.preprocess, share),
                access=self.access,
                quarantine=QuarantineService(settings, self.ledger),
                receipts=ReceiptService(settings),
                deletions=DeletionService(settings, self.ledger),
                calibrations=Calibrations(lambda key: Artifacts(settings.artifacts).read_bytes(key)),
                answers=answers,
                audits=AnswerAudits(self.ledger, answers, settings.feedback.audit_share),
                feedback=FeedbackService(self.ledger, settings.feedback.accept),
                ledger=self.ledger,
                refresh=self.refresh,
                vlms=self.vlms,
                shadow_traffic=self.shadow_traffic,
                proxies=proxies(settings.serve),
                token_text=token_texts(vlm_folder),
            )
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        freeze_gc()
        return self.http_app

    async def adopt(self, window: Sequence[ReleaseSnapshot]) -> int:
        """Bind new requests to these releases; the newest is live."""
        number = self.admission.adopt(window)
        metrics.release.live("ingress", number)
        return number

    async def resident(self) -> tuple[ReleaseSnapshot, ...]:
        """The releases that requests may name here, newest first."""
        return self.admission.window

    async def in_flight(self) -> dict[int, int]:
        return self.admission.in_flight()

    async def drain(self) -> dict[int, int]:
        """Admit no more requests; returns those in flight, by release."""
        self.admission.closed = True
        return self.admission.in_flight()

    async def observations(self) -> Observations:
        """Observations of the watched release; the controller adds them up over replicas."""
        return self.shadow_traffic.observations(self.admission.answered())

    async def check_health(self) -> None:
        """Serve asks this before it sends requests here, and then every few seconds. Keeps the background tasks
        running, and waits for the VLM's start."""
        if not self._tasks:
            await asyncio.gather(self._adopt_first(), *([self.vlms.look()] if self.vlms is not None else []))
        work = {
            "follow": self._follow, "compare": self.shadow_traffic.run, "keys": self._read_keys,
            "probe": self.http_app.state.probes.watch,
        }  # fmt: skip
        if self.vlms is not None and self.vlms.start_problem:
            work["vlm"] = self.vlms.wait_started
        keep_running(self._tasks, work)

    async def refresh(self) -> None:
        """Adopt what is live in the ledger."""
        live = self.admission.live
        residency = await self.residency_reader.read(newer_than=live.release if live else 0)
        if residency is not None:
            await self.adopt(residency.window)

    async def _adopt_first(self) -> None:
        """Learn what is live before the first request: a replacement gets requests at once."""
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
            except Exception as error:  # ledger or encoders are away: keep serving the known releases
                log.warning("cannot follow the ledger: %s: %s", type(error).__name__, error)
            await asyncio.sleep(FOLLOW_SECONDS)

    async def _read_keys(self) -> None:
        while True:
            await self._keys.run(self.access.refresh)
            if (keys := self.access.current()) is not None:
                await self._keys.run(self.key_copy.keep, keys)
            await asyncio.sleep(KEYS_SECONDS)


def share_of(settings: Serve) -> Serve:
    """The limits of one ingress process: shared ones divided by ``ingress_replicas``, those of one request unchanged.
    Processes beyond that number, added by autoscaling, have a share of their own."""
    return settings.model_copy(update={n: -(-getattr(settings, n) // settings.ingress_replicas) for n in SHARED})


def token_texts(model: Path | None) -> Callable[[int], str]:
    """A function from a VLM's token to its text, for log-probabilities; part of a character is U+FFFD. ``model``: a
    Hugging Face folder; without it or its ``tokenizer.json`` the text is ``token_id:7``."""
    path = model / "tokenizer.json" if model is not None else None
    if path is None or not path.is_file():
        return "token_id:{}".format
    tokenizer = Tokenizer.from_file(str(path))

    @lru_cache(_KEPT_TEXTS)
    def text_of(token: int) -> str:
        raw: str | None = tokenizer.id_to_token(token)
        if raw is None:
            return f"token_id:{token}"
        text: str = tokenizer.decode([token], skip_special_tokens=False)
        return f" {text}" if raw.startswith(_WORD_START) and not text.startswith(" ") else text

    return text_of
