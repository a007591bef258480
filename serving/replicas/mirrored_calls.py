"""The models as routes see them, with an eye on what they are asked: the comparer gets a sample of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from serving.engines.vlm.generation import GenerationRequest, GenerationResult, TokenChunk
from serving.messages import EncodeResult, Kind
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.shadow_traffic import ShadowTraffic
from serving.replicas.encoder_calls import EncoderCalls
from serving.replicas.vlm_calls import PROBE, VlmCalls


class MirroredEncoders:
    """Implements :class:`serving.http.app_state.Encoders`."""

    def __init__(self, calls: EncoderCalls, shadow_traffic: ShadowTraffic) -> None:
        self.calls = calls
        self.shadow_traffic = shadow_traffic

    async def encode(self, kind: Kind, payload: Any, stamp: ReleaseSnapshot, deadline: float) -> EncodeResult:
        """See :meth:`EncoderCalls.encode`."""
        answer = await self.calls.encode(kind, payload, stamp, deadline)
        if self.shadow_traffic.watching:
            self.shadow_traffic.clip(kind, payload)
        return answer


class MirroredVlms:
    """Implements :class:`serving.http.app_state.Vlms`."""

    def __init__(self, calls: VlmCalls, shadow_traffic: ShadowTraffic) -> None:
        self.calls = calls
        self.shadow_traffic = shadow_traffic

    async def reply(self, ask: GenerationRequest, stamp: ReleaseSnapshot, deadline: float) -> GenerationResult:
        """See :meth:`VlmCalls.reply`."""
        reply = await self.calls.reply(ask, stamp, deadline)
        self._offer(ask)
        return reply

    async def score(
        self, ask: GenerationRequest, choices: Sequence[str], stamp: ReleaseSnapshot, deadline: float
    ) -> list[float]:
        """See :meth:`VlmCalls.score`."""
        scores = await self.calls.score(ask, choices, stamp, deadline)
        self._offer(ask)
        return scores

    def stream(self, ask: GenerationRequest, stamp: ReleaseSnapshot, deadline: float) -> AsyncIterator[TokenChunk]:
        """See :meth:`VlmCalls.stream`: its own iterator, so that a piece costs nothing more."""
        self._offer(ask)
        return self.calls.stream(ask, stamp, deadline)

    def _offer(self, ask: GenerationRequest) -> None:
        if self.shadow_traffic.watching and ask is not PROBE:
            self.shadow_traffic.vlm(ask)
