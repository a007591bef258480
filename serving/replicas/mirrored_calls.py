"""The models as routes see them, with an eye on what they are asked: the comparer gets a sample of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from serving.engines.vlm.generation import Ask, Piece, Reply
from serving.messages import Answer, Kind
from serving.releases.release_snapshot import Stamp
from serving.releases.shadow_traffic import Comparer
from serving.replicas.encoder_calls import EncoderCalls
from serving.replicas.vlm_calls import PROBE, VlmCalls


class ObservedEncoders:
    """Implements :class:`serving.http.app_state.Encoders`."""

    def __init__(self, calls: EncoderCalls, comparer: Comparer) -> None:
        self.calls = calls
        self.comparer = comparer

    async def encode(self, kind: Kind, payload: Any, stamp: Stamp, deadline: float) -> Answer:
        """See :meth:`EncoderCalls.encode`."""
        answer = await self.calls.encode(kind, payload, stamp, deadline)
        if self.comparer.watching:
            self.comparer.clip(kind, payload)
        return answer


class ObservedVlms:
    """Implements :class:`serving.http.app_state.Vlms`."""

    def __init__(self, calls: VlmCalls, comparer: Comparer) -> None:
        self.calls = calls
        self.comparer = comparer

    async def reply(self, ask: Ask, stamp: Stamp, deadline: float) -> Reply:
        """See :meth:`VlmCalls.reply`."""
        reply = await self.calls.reply(ask, stamp, deadline)
        self._offer(ask)
        return reply

    async def score(self, ask: Ask, choices: Sequence[str], stamp: Stamp, deadline: float) -> list[float]:
        """See :meth:`VlmCalls.score`."""
        scores = await self.calls.score(ask, choices, stamp, deadline)
        self._offer(ask)
        return scores

    def stream(self, ask: Ask, stamp: Stamp, deadline: float) -> AsyncIterator[Piece]:
        """See :meth:`VlmCalls.stream`: its own iterator, so that a piece costs nothing more."""
        self._offer(ask)
        return self.calls.stream(ask, stamp, deadline)

    def _offer(self, ask: Ask) -> None:
        if self.comparer.watching and ask is not PROBE:
            self.comparer.vlm(ask)
