"""The models as routes call them; what they are asked is offered to :class:`ShadowTraffic` too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.messages import EncodeResult, Modality
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.shadow_traffic import ShadowTraffic
from serving.replicas.encoder_calls import EncoderCalls
from serving.replicas.vlm_calls import VlmCalls
from serving.replicas.vlm_start import VlmStart


class MirroredEncoders:
    """Implements :class:`serving.http.app_state.Encoders`."""

    def __init__(self, calls: EncoderCalls, shadow_traffic: ShadowTraffic) -> None:
        self.calls = calls
        self.shadow_traffic = shadow_traffic

    async def encode(
        self, kind: Modality, payload: Any, snapshot: ReleaseSnapshot, deadline: float, caller: str = ""
    ) -> EncodeResult:
        """See :meth:`EncoderCalls.encode`."""
        result = await self.calls.encode(kind, payload, snapshot, deadline, caller)
        if self.shadow_traffic.watching:
            self.shadow_traffic.clip(kind, payload)
        return result

    async def heads(self, snapshot: ReleaseSnapshot, deadline: float) -> Mapping[str, Any]:
        """See :meth:`EncoderCalls.heads`."""
        return await self.calls.heads(snapshot, deadline)


class MirroredVlms:
    """Implements :class:`serving.http.app_state.Vlms`."""

    def __init__(self, calls: VlmCalls, shadow_traffic: ShadowTraffic, start: VlmStart) -> None:
        self.calls = calls
        self.shadow_traffic = shadow_traffic
        self.start = start

    @property
    def start_problem(self) -> str:
        """See :attr:`VlmStart.problem`."""
        return self.start.problem

    async def reply(self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """See :meth:`VlmCalls.reply`."""
        reply = await self.calls.reply(request, snapshot, deadline)
        self._offer(request)
        return reply

    async def probe(self, snapshot: ReleaseSnapshot, deadline: float) -> None:
        """See :meth:`VlmCalls.probe`."""
        await self.calls.probe(snapshot, deadline)

    async def score(
        self, request: GenerationRequest, choices: Sequence[str], snapshot: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """See :meth:`VlmCalls.score`."""
        scores = await self.calls.score(request, choices, snapshot, deadline)
        self._offer(request)
        return scores

    def stream(
        self, request: GenerationRequest, snapshot: ReleaseSnapshot, deadline: float
    ) -> AsyncIterator[TokenChunk]:
        """See :meth:`VlmCalls.stream`: its own iterator, so that a chunk costs nothing more."""
        self._offer(request)
        return self.calls.stream(request, snapshot, deadline)

    def _offer(self, request: GenerationRequest) -> None:
        if self.shadow_traffic.watching:
            self.shadow_traffic.vlm(request)
