"""The release protocol without Ray: replicas that are plain objects, and an operator's commands."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from core.errors import ReleaseError
from core.ledger import Family, Ledger, ReleaseRow
from serving.releases.guard import Observations
from serving.releases.protocol import ReleaseProtocol
from serving.releases.types import (
    FAMILIES,
    Prepared,
    PromoteCommand,
    ReleaseCommand,
    ReleaseResult,
    ReleaseSnapshot,
    Residency,
    RollbackCommand,
)


@dataclass
class PlainBroadcast:
    """Two encoders and a VLM that can serve everything not named in ``broken`` or ``gone``; the second encoder also
    has copies of ``cached`` adapters.
    """

    broken: dict[str, str] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    cached: set[str] = field(default_factory=set)
    never: set[str] = field(default_factory=set)
    stuck: str = ""
    """The image space whose coverage takes until ``unstick``."""
    unstick: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event | None = None
    retire_gate: asyncio.Event | None = None
    spaces: dict[tuple[int, str | None], str] = field(default_factory=dict)
    flight: dict[int, int] = field(default_factory=dict)
    answering: list[ReleaseSnapshot] = field(default_factory=list)
    seen: list[Observations] = field(default_factory=list)
    has_vlm: bool = True
    vlm_up: bool = True
    deaf: bool = False
    asked: list[str] = field(default_factory=list)
    prepared: list[str | None] = field(default_factory=list)
    prepared_vlm: list[str | None] = field(default_factory=list)
    covered: list[tuple[str, bool]] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    indexed: list[list[int]] = field(default_factory=list)
    vlms: list[tuple[str | None, ...]] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    loaded: list[tuple[str | None, ...]] = field(default_factory=list)

    async def _pass(self, name: str) -> None:
        self.asked.append(name)
        if name in self.never:
            await asyncio.Event().wait()

    def encoder(self, replica: int, clip: str | None) -> Prepared:
        if clip in self.gone and not (replica == 2 and clip in self.cached):
            return Prepared(f"r{replica}", clip, error="no file", cause="adapter")
        error = self.broken.get(clip or "", "")
        return Prepared(f"r{replica}", clip, self.spaces.get((replica, clip), f"i-{clip}"), f"t-{clip}", error)

    async def prepare(self, clip: str | None) -> list[Prepared]:
        await self._pass("prepare")
        self.prepared.append(clip)
        if self.gate is not None:
            await self.gate.wait()
        return [self.encoder(replica, clip) for replica in (1, 2)]

    async def prepare_vlm(self, vlm: str | None) -> list[Prepared]:
        await self._pass("prepare_vlm")
        self.prepared_vlm.append(vlm)
        if self.gate is not None:
            await self.gate.wait()
        if vlm in self.gone:
            return [Prepared("v1", vlm, error="no file", cause="adapter")]
        return [Prepared("v1", vlm, error=self.broken.get(vlm or "", ""))]

    async def cover(self, snapshot: ReleaseSnapshot, wait: bool) -> int:
        await self._pass("cover")
        self.covered.append((snapshot.image_space, wait))
        if snapshot.image_space == self.stuck:
            await self.unstick.wait()
        return 7

    async def resident(self) -> list[ReleaseSnapshot]:
        return list(self.answering)

    async def announce(self, resident: Residency, seconds: float) -> int:
        await self._pass("announce")
        if self.deaf:
            raise ReleaseError("no replica answers")
        self.windows.append([snapshot.release for snapshot in resident.window])
        self.indexed.append([snapshot.release for snapshot in resident.indexed])
        self.vlms.append(resident.vlms)
        return 3

    async def observations(self) -> list[Observations]:
        self.asked.append("observations")
        return self.seen

    async def in_flight(self) -> dict[int, int]:
        await self._pass("in_flight")
        return dict(self.flight)

    async def retire_spaces(self, keep: Sequence[ReleaseSnapshot], epoch: int | None) -> None:
        await self._pass("retire_spaces")
        self.kept.append([snapshot.release for snapshot in keep])

    async def retire(self, clips: Sequence[str | None], vlms: Sequence[str | None]) -> None:
        self.loaded.append((*clips, *vlms))
        await self._pass("retire")
        if self.retire_gate is not None:
            await self.retire_gate.wait()

    async def encoder_status(self) -> list[dict[str, Any]]:
        return [{"replica": "r1", "precision": "float32"}]

    async def vlm_status(self) -> list[dict[str, Any]]:
        self.asked.append("vlm_status")
        return [{"replica": "v1"}] if self.has_vlm and self.vlm_up else []

    async def replica_states(self) -> dict[str, dict[str, int]]:
        return {"Encoder": {"RUNNING": 2}}


class Server(ReleaseProtocol):
    """The release protocol of one server over plain replicas, with an operator's commands; its window is two
    releases.
    """

    broadcast: PlainBroadcast  # type: ignore[assignment]

    def __init__(self, ledger: Ledger, replicas: PlainBroadcast | None = None, **options: Any) -> None:
        super().__init__(ledger, replicas or PlainBroadcast(), 2, **options)  # type: ignore[arg-type]

    @property
    def live_row(self) -> ReleaseRow:
        row = self.ledger.live()
        assert row is not None
        return row

    @property
    def live(self) -> tuple[int, str | None, str | None]:
        return self.live_row.number, self.live_row.clip, self.live_row.vlm

    def propose(self, family: Family = "clip", name: str = "a", other: str | None = None) -> int:
        """An update that passed the gate; ``other``: the other family's adapter at that time."""
        clip, vlm = (name, other) if family == "clip" else (other, name)
        made = self.ledger.propose("update", family=family, clip=clip, vlm=vlm, actor="updater", reason="passed")
        return made.id

    async def create(self, share: float = 1.0, expected: int | None = None, **adapters: str | None) -> ReleaseResult:
        """Release these adapters on top of the live ones. ``expected``: the release that the operator looked at."""
        named: dict[Family, str | None] = {family: adapters[family] for family in FAMILIES if family in adapters}
        at = self.live[0] if expected is None else expected
        return await self.release(
            ReleaseCommand(adapters=named, actor="me", reason="test", expected_live=at, share=share)
        )

    async def promote_live(self, expected: int | None = None) -> ReleaseResult:
        at = self.live[0] if expected is None else expected
        return await self.promote(PromoteCommand(actor="me", reason="fine", expected_live=at))

    async def back(self, family: Family | None = None, to: int | None = None) -> ReleaseResult:
        """Roll back; fails if that waits for something it must not wait for."""
        command = RollbackCommand(actor="ann", reason="bad", expected_live=self.live[0], family=family, to=to)
        return await asyncio.wait_for(self.rollback(command), 5)
