"""What the routes share: admission, the models, the catalog, the controller, and the ledger for reading."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

from fastapi import Request

from core import metrics
from core.access import Access, Principal
from core.ledger import Ledger
from core.ledger.rows import Family
from core.settings.serving import Serve
from serving.engines.tokens import Tokenizer
from serving.errors import VlmStarting
from serving.http.catalog_calls import CatalogCalls
from serving.http.clip_vectors import ClipVectors, VectorCache, room_for
from serving.http.controller_calls import ControllerCalls
from serving.http.encoder_calls import EncoderCalls, ReleaseHeads
from serving.http.errors import ApiError, is_fault
from serving.http.image_loader import ImageLoader
from serving.http.probes import Probes
from serving.http.recent import LastReleases, Recent
from serving.http.store_services import DeletionService, QuarantineService, ReceiptService
from serving.http.vlm_calls import MirroredVlms
from serving.releases.admission import Admission
from serving.releases.types import ReleaseSnapshot

OPERATOR_THREADS = 4
CLIP: Family = "clip"
VLM: Family = "vlm"
_KEY_HEADER = "x-ratchet-key"


@dataclass(frozen=True)
class AppState:
    """Everything a route needs; one per ingress replica, in ``app.state.ratchet``."""

    settings: Serve
    dim: int
    tokenizer: Tokenizer
    admission: Admission
    encoders: EncoderCalls
    index: CatalogCalls
    operations: ControllerCalls
    image_loader: ImageLoader
    access: Access
    ledger: Ledger
    refresh: Callable[[], Awaitable[None]]
    quarantine: QuarantineService
    receipts: ReceiptService
    deletions: DeletionService
    vlms: MirroredVlms | None = None
    """None: no VLM is served."""
    token_text: Callable[[int], str] = "token_id:{}".format
    """What a token of the VLM reads as, for log-probabilities."""
    proxies: Sequence[str] = ()
    """Networks whose ``X-Forwarded-For`` counts."""

    @cached_property
    def vectors(self) -> ClipVectors:
        """Vectors of texts and images, of the cache or of the encoders."""
        cache, room = VectorCache(self.settings.cache_bytes), room_for(self.settings)
        return ClipVectors(self.encoders, self.image_loader, self.tokenizer, cache, room)

    @cached_property
    def heads(self) -> ReleaseHeads:
        """The heads of the resident releases."""
        return ReleaseHeads(self.encoders)

    @cached_property
    def probes(self) -> Probes:
        """State of the models for probes."""
        return Probes(self)

    @cached_property
    def metrics_page(self) -> Recent[bytes]:
        """The metrics of all serving processes, in Prometheus' text format; one page for all who ask at once."""
        thread = ThreadPoolExecutor(1, "metrics")

        async def page() -> bytes:
            return await asyncio.get_running_loop().run_in_executor(thread, metrics.exposition, "serve")

        return Recent(page, seconds=0.0)

    @cached_property
    def releases(self) -> LastReleases:
        """The newest releases of the ledger."""
        return LastReleases(self.ledger.releases)

    @cached_property
    def operator_threads(self) -> ThreadPoolExecutor:
        """For what operator calls read: no other call can keep them waiting."""
        return ThreadPoolExecutor(OPERATOR_THREADS, "operator")

    def need_vlms(self) -> MirroredVlms:
        """The VLM's replicas. Raises ApiError where there are none, VlmStarting until one has started."""
        if self.vlms is None:
            raise ApiError(
                404,
                "no vision-language model is served here. Make one with `ratchet base build` and name it in base.vlm.",
                param="model",
                code="no_vlm",
            )
        if problem := self.vlms.start_problem:
            raise VlmStarting(problem, "Send the request again after the time in Retry-After; CLIP answers meanwhile.")
        return self.vlms

    def admit(
        self, request: Request, model: str, family: Family = CLIP, user: str | None = None
    ) -> AbstractContextManager[ReleaseSnapshot]:
        """Stamp one request and count how it ends. ``user``: what its body says of who asks."""
        key = routing_key(request, user) if self.admission.splits else ""
        return self.admission.admit(model, family, key, is_fault)

    def failed(self, snapshot: ReleaseSnapshot, error: Exception) -> None:
        """A stream broke off after :meth:`admit`'s block had begun to answer."""
        if is_fault(error):
            self.admission.failed(snapshot.release)

    def deadline(self) -> float:
        """When an answer to a request that comes now is too late; on the monotonic clock, which nobody sets."""
        return time.monotonic() + self.settings.deadline_seconds

    def check_texts(
        self, texts: list[str], param: str, most: int | None = None, places: Sequence[int] | None = None
    ) -> None:
        """Refuse too many, too long or empty texts. ``places``: of the texts, where others stand between them."""
        limit = most or self.settings.max_texts
        if len(texts) > limit:
            raise ApiError(400, f"{len(texts)} texts are more than {limit}.", param=param, code="too_many_texts")
        for index, text in zip(places or range(len(texts)), texts, strict=True):
            field = f"{param}.{index}"
            if not text:
                raise ApiError(400, f"{field}: the text is empty.", param=field, code="empty_text")
            self.check_length(field, text)

    def check_length(self, param: str, text: str) -> None:
        """Refuse a text that is too long."""
        if len(text) > self.settings.max_text_chars:
            raise ApiError(
                400, f"{param}: {len(text)} characters are more than {self.settings.max_text_chars}.",
                param=param, code="text_too_long",
            )  # fmt: skip


def app_state(request: Request) -> AppState:
    """The state of the app that serves this request."""
    state: AppState = request.app.state.ratchet
    return state


def release_headers(snapshot: ReleaseSnapshot, family: Family = CLIP) -> dict[str, str]:
    """Which release answered, by which adapter."""
    return {"x-ratchet-release": str(snapshot.release), "x-ratchet-adapter": snapshot.shown(family)}


def routing_key(request: Request, user: str | None = None) -> str:
    """A text that is the same for all requests of one caller: its API key, else what it says of itself in
    ``x-ratchet-key`` or in the body's ``user``, else the request alone. It is hashed at once and kept nowhere.

    A key counts where it is one of ours: OpenAI's clients send any text where none is needed, all of them the same.
    """
    caller: Principal | None = getattr(request.state, "principal", None)
    key = caller.key_id if caller is not None else None
    headers = request.headers
    return key or headers.get(_KEY_HEADER) or user or headers.get("x-request-id") or uuid.uuid4().hex
