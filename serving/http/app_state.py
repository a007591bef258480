"""What the routes share: admission, the models, the catalog, the controller, and the ledger for reading."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from fastapi import Request

from core import metrics
from core.access import Access
from core.ledger import Ledger
from core.ledger.rows import DeletionState, Family
from core.settings.serving import Serve
from serving.catalog.queries import Filters, Hit
from serving.engines.tokens import Tokenizer
from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.errors import VlmStarting
from serving.http.clip_vectors import ClipVectors, Encoders, room_for
from serving.http.errors import ApiError, is_fault
from serving.http.image_loader import ImageLoader
from serving.http.probes import Probes
from serving.http.recent import LastReleases, Recent
from serving.http.release_heads import ReleaseHeads
from serving.http.routing_key import routing_key
from serving.http.vector_cache import VectorCache
from serving.releases.admission import Admission
from serving.releases.commands import HoldingCommand, LiveCommand
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.types import ReleaseResult

if TYPE_CHECKING:
    from streams.resubmit import RefusalFilter

OPERATOR_THREADS = 4
CLIP: Family = "clip"
VLM: Family = "vlm"


class Vlms(Protocol):
    """See :class:`serving.replicas.mirrored_calls.MirroredVlms`. Every method answers by the snapshot's VLM adapter.

    Deadlines are on the monotonic clock of this process. All raise QueueFull, DeadlineExceeded, Unavailable and
    InvalidRequest.
    """

    @property
    def start_problem(self) -> str:
        """Why no replica can answer yet; empty once one has."""

    async def reply(self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """The whole answer. Cancelling aborts the request."""

    async def probe(self, snapshot: ReleaseSnapshot, deadline: float) -> None:
        """Have a token made. QueueFull: the VLM is busy, and makes progress."""

    def stream(
        self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float
    ) -> AsyncIterator[TokenChunk]:
        """The answer chunk by chunk. Closing the iterator aborts the request."""

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """Log-probability of each choice as the whole answer."""


class Index(Protocol):
    """See :class:`serving.releases.broadcast.CatalogCalls`."""

    async def search(self, space: str, vector: npt.NDArray[np.float32], k: int, filters: Filters) -> list[Hit]:
        """The nearest samples."""

    async def image(self, sample_id: str) -> bytes | None:
        """An encoded image."""

    async def status(self) -> dict[str, Any]:
        """Rows and coverage."""


class Operations(Protocol):
    """See :class:`serving.releases.controller.ReleaseController`."""

    async def change(self, command: LiveCommand) -> ReleaseResult:
        """Carry out a release, promotion or rollback. Raises ReleaseError, ReleaseConflict, LedgerError."""

    async def hold(self, command: HoldingCommand) -> None:
        """Let updates wait, or let them through again."""

    async def status(self) -> dict[str, Any]:
        """What the controller does."""


class Quarantine(Protocol):
    """See :class:`serving.http.quarantine_service.QuarantineService`."""

    async def newest(self, limit: int, reason: str | None, source: str | None) -> list[dict[str, Any]]:
        """Refused records, newest first."""

    async def counts(self, reason: str | None, source: str | None) -> dict[str, dict[str, int]]:
        """Refused records by ``reason`` and by ``source``."""

    async def resubmit(self, param: str, *, actor: str, reason: str, force: bool) -> dict[str, Any]:
        """Send one again; where the topic has it now."""

    async def resubmit_many(self, which: RefusalFilter, *, actor: str, reason: str, dry_run: bool) -> dict[str, Any]:
        """Send many again; counts of what became of them."""


class Receipts(Protocol):
    """See :class:`serving.http.receipt_service.ReceiptService`. Both raise StoreUnavailable."""

    async def of_position(self, topic: str, partition: int, offset: int) -> list[dict[str, Any]]:
        """What became of a record; at least one receipt."""

    async def of_sample(self, sample_id: str) -> list[dict[str, Any]]:
        """What became of the records of a sample. Raises RecordError for what is no id."""


class Deletions(Protocol):
    """See :class:`serving.http.deletion_service.DeletionService`."""

    async def selected(self, selector: Mapping[str, str]) -> dict[str, int]:
        """How many ``samples`` and ``refusals`` are selected. Raises SelectorError, StoreUnavailable."""

    async def request(self, selector: Mapping[str, str], *, actor: str, reason: str) -> dict[str, Any]:
        """Ask for a deletion; its receipt. Raises SelectorError."""

    async def newest(self, limit: int, state: DeletionState | None) -> list[dict[str, Any]]:
        """Receipts, newest first."""

    async def one(self, deletion_id: str) -> dict[str, Any] | None:
        """One receipt, or None."""


@dataclass(frozen=True)
class AppState:
    """Everything a route needs; one per ingress replica, in ``app.state.ratchet``."""

    settings: Serve
    dim: int
    tokenizer: Tokenizer
    admission: Admission
    encoders: Encoders
    index: Index
    operations: Operations
    image_loader: ImageLoader
    access: Access
    ledger: Ledger
    refresh: Callable[[], Awaitable[None]]
    quarantine: Quarantine
    receipts: Receipts
    deletions: Deletions
    vlms: Vlms | None = None
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

    def need_vlms(self) -> Vlms:
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
