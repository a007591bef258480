"""State that the routes share."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from functools import cached_property

from fastapi import Request

from core.access import Access, Principal
from core.ledger import Ledger
from core.ledger.rows import Family
from core.settings.serving import Serve
from serving.engines.tokens import Tokenizer
from serving.engines.vlm.generation import GenerationRequest
from serving.errors import VlmStarting
from serving.http.answer_audits import AnswerAudits
from serving.http.answer_receipts import HEADER, AnswerReceipts, Route
from serving.http.calibrations import Calibrations
from serving.http.calls import CatalogCalls, ControllerCalls, VlmCalls
from serving.http.clip_vectors import ClipVectors, EncoderCalls
from serving.http.errors import ApiError, field_error, is_fault
from serving.http.image_loader import ImageLoader
from serving.http.request_bodies import cancel_on_disconnect
from serving.http.store_services import DeletionService, FeedbackService, QuarantineService, ReceiptService
from serving.messages import TEXT_CHARS, TEXTS_PER_REQUEST
from serving.releases.admission import Admission
from serving.releases.shadow_traffic import ShadowTraffic
from serving.releases.types import ReleaseSnapshot

CLIP: Family = "clip"
VLM: Family = "vlm"


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
    answers: AnswerReceipts
    feedback: FeedbackService
    deletions: DeletionService
    calibrations: Calibrations
    vlms: VlmCalls | None = None
    """None: no VLM is served."""
    shadow_traffic: ShadowTraffic | None = None
    """Gets questions to VLMs; :class:`EncoderCalls` offers it what clients had encoded."""
    audits: AnswerAudits | None = None
    """None: no answer is audited."""
    token_text: Callable[[int], str] = "token_id:{}".format
    """The text of a token of the VLM, for log-probabilities."""
    proxies: Sequence[str] = ()
    """Networks whose ``X-Forwarded-For`` is trusted."""

    @cached_property
    def vectors(self) -> ClipVectors:
        return ClipVectors(self.encoders, self.image_loader, self.tokenizer, self.settings)

    def need_vlms(self, param: str = "model") -> VlmCalls:
        """The VLM's replicas. Raises ApiError without a VLM (``param``: the field that needs it), VlmStarting until one
        has started."""
        if self.vlms is None:
            raise ApiError(
                404,
                "no vision-language model is served here. Make one with `ratchet base build` and name it in base.vlm.",
                param=param,
                code="no_vlm",
            )
        if problem := self.vlms.start_problem:
            raise VlmStarting(problem, "Send the request again after the time in Retry-After; CLIP answers meanwhile.")
        return self.vlms

    def offer(self, generation: GenerationRequest) -> None:
        if self.shadow_traffic is not None:
            self.shadow_traffic.vlm(generation)

    def admit(
        self, request: Request, model: str, family: Family = CLIP, user: str | None = None, space: str | None = None
    ) -> AbstractContextManager[ReleaseSnapshot]:
        """Bind one request to a release, and count how it ends. ``user``: the caller, as the body names it. ``space``:
        an embedding space that the release must have."""
        key = routing_key(request, user) if self.admission.splits else ""
        return self.admission.admit(model, family, key, is_fault, space)

    @asynccontextmanager
    async def answering(
        self, request: Request, model: str, family: Family = CLIP, user: str | None = None, space: str | None = None
    ) -> AsyncIterator[tuple[ReleaseSnapshot, float]]:
        """Bind one request whose body was read, and cancel its work when the client leaves or the deadline passes.
        Yields the release that answers, and the deadline."""
        deadline = self.deadline()
        with self.admit(request, model, family, user, space) as snapshot:
            async with cancel_on_disconnect(request.receive, deadline):
                yield snapshot, deadline

    def failed(self, snapshot: ReleaseSnapshot, error: Exception) -> None:
        """Count a stream that broke off after :meth:`admit`'s block had begun to answer."""
        if is_fault(error):
            self.admission.failed(snapshot.release)

    def deadline(self) -> float:
        """Deadline of a request that arrives now, on the monotonic clock."""
        return time.monotonic() + self.settings.deadline_seconds

    def check_texts(
        self, texts: list[str], param: str, most: int | None = None, places: Sequence[int] | None = None
    ) -> None:
        """Refuse too many, too long or empty texts. ``places``: their positions, if other inputs are between them."""
        limit = most or TEXTS_PER_REQUEST
        if len(texts) > limit:
            raise field_error(param, f"{len(texts)} texts are more than {limit}.", "too_many_texts")
        for index, text in zip(places or range(len(texts)), texts, strict=True):
            field = f"{param}.{index}"
            if not text:
                raise field_error(field, "the text is empty.", "empty_text")
            self.check_length(field, text)

    def check_length(self, param: str, text: str) -> None:
        if len(text) > TEXT_CHARS:
            raise field_error(param, f"{len(text)} characters are more than {TEXT_CHARS}.", "text_too_long")

    def headers(
        self,
        request: Request,
        route: Route,
        snapshot: ReleaseSnapshot,
        family: Family = CLIP,
        shown: Sequence[str] = (),
    ) -> dict[str, str]:
        """Headers of an answer: its release, and its receipt. ``shown``: IDs of the samples that were found."""
        receipt = self.answers.issue(route, snapshot.release, request.state.body, shown)
        return release_headers(snapshot, family) | {HEADER: receipt}


def app_state(request: Request) -> AppState:
    state: AppState = request.app.state.ratchet
    return state


def release_headers(snapshot: ReleaseSnapshot, family: Family = CLIP) -> dict[str, str]:
    """Names of the release and its adapter and, for a CLIP, of its embedding spaces."""
    names = {"x-ratchet-release": str(snapshot.release), "x-ratchet-adapter": snapshot.shown(family)}
    spaces = {"x-ratchet-image-space": snapshot.image_space, "x-ratchet-text-space": snapshot.text_space}
    return names | spaces if family == CLIP else names


def routing_key(request: Request, user: str | None = None) -> str:
    """A text that is the same for all requests of one caller: its API key, else ``x-ratchet-key``, the body's ``user``,
    or the request ID. It is only hashed. Only Ratchet's keys count: OpenAI's clients send any text where no key is
    needed, all of them the same."""
    caller: Principal | None = getattr(request.state, "principal", None)
    key = caller.key_id if caller is not None else None
    headers = request.headers
    return key or headers.get("x-ratchet-key") or user or headers.get("x-request-id") or uuid.uuid4().hex
