"""Preparation: replicas load an adapter next to what they serve and agree on its spaces; the catalog is embedded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal

from core.errors import ReleaseConflict, ReleaseError
from core.ledger import Ledger
from core.ledger.rows import ProposalRow, ReleaseRow, Scope
from serving.releases.broadcast import Broadcast
from serving.releases.residency import ResidencyRows, read_residency, resolve_residency
from serving.releases.types import Prepared, ReleaseSnapshot, Residency, RollbackCommand, TargetAdapters

log = logging.getLogger("ratchet.protocol")
INDEX_POLL_SECONDS: Final = 0.2
IndexPolicy = Literal["wait", "cross", "ignore"]


class Postponed(Exception):
    """A proposal gave way to a hold, or to a rollback of the other family, and waits again."""


@dataclass(slots=True)
class PreparingProposal:
    """A proposal from its turn until it is committed."""

    proposal: ProposalRow
    task: asyncio.Task[TargetAdapters] | None = None
    target: TargetAdapters | None = None
    """The adapters that replicas are loading for it."""
    number: int = 0
    """Number of the future release."""
    share: float = 1.0
    """Share of requests that it will answer."""
    stopped_by: str = ""
    stopped_for: Scope = "both"

    def stop(self, command: RollbackCommand, scope: Scope) -> None:
        self.stopped_by = f"{command.actor} rolled back while it was being prepared"
        self.stopped_for = scope
        if self.task is not None:
            self.task.cancel()

    def check(self) -> None:
        """Raise if stopped: Postponed for an update of the other family, which waits again, else ReleaseConflict."""
        if not self.stopped_by:
            return
        if self.proposal.kind == "update" and {self.proposal.family, self.stopped_for} == {"clip", "vlm"}:
            raise Postponed
        raise ReleaseConflict(f"{self.stopped_by}.", "Look at what is live, and propose again.")


class Preparation:
    """Makes replicas ready for adapters, and remembers their embedding spaces. Use from one event loop."""

    def __init__(
        self, ledger: Ledger, broadcast: Broadcast, size: int, base: str | None = None, indexes: IndexPolicy = "wait"
    ) -> None:
        """``base``: digest of the encoders' base; None: there is only one. ``indexes``: ``rollout.indexes``."""
        self.ledger = ledger
        self.broadcast = broadcast
        self.size = size
        self.base = base
        self.indexes = indexes
        self.waits_for: list[str] = []
        """Indexes outside that do not have the image space of the release that is being prepared."""
        self.spaces: dict[str | None, tuple[str, str]] = {}
        """Image and text space of each CLIP adapter that replicas can serve."""

    async def make_ready(self, target: TargetAdapters, live: ReleaseRow | None) -> None:
        """Prepare the families that change, at once. The first release waits for encoders only: VLM replicas start with
        their base, and the catalog embeds what there is. Raises ReleaseError when a replica cannot serve an adapter."""
        tasks: list[asyncio.Task[None]] = []
        if live is None or target["clip"] != live.clip:
            tasks.append(asyncio.create_task(self._ready_clip(target["clip"], live)))
        if self.broadcast.has_vlm and target["vlm"] != (live.vlm if live else None):
            tasks.append(asyncio.create_task(self._ready_vlm(target["vlm"])))
        try:
            await asyncio.gather(*tasks)
        finally:  # the first failure stops the other one
            for task in tasks:
                task.cancel()

    async def _ready_clip(self, clip: str | None, live: ReleaseRow | None) -> None:
        image, text = self._agreed(clip, await self.broadcast.prepare(clip))
        if live is None:
            return
        residency = await asyncio.to_thread(self.read)
        # Resident spaces are always kept complete: a rollback need not wait for rows that just arrived.
        snapshot = ReleaseSnapshot(live.number + 1, clip, image, text)
        await self.broadcast.cover(snapshot, wait=clip not in residency.clips)

    async def _ready_vlm(self, vlm: str | None) -> None:
        _check(await self.broadcast.prepare_vlm(vlm), vlm, "the VLM base")

    async def wait_for_indexes(self, clip: str | None, live: ReleaseRow | None) -> None:
        """Wait until each index outside that is not paused can be searched in the image space of ``clip``, if the
        release changes that space, and ``rollout.indexes`` says so."""
        if live is None or clip == live.clip or self.indexes == "ignore":
            return
        (space, _), (before, _) = self.spaces[clip], await self._ask(live.clip) or ("", "")
        if self.indexes == "cross":
            measured = await asyncio.to_thread(self.ledger.cross_version, clip)
            if measured and measured["allowed"] and measured["incumbent"] == live.clip:
                return
        try:
            while space != before:
                waits_for = await asyncio.to_thread(self.ledger.unready_indexes, space)
                if waits_for and not self.waits_for:
                    log.info("the release of %s waits for indexes: %s", clip or "the base", "; ".join(waits_for))
                self.waits_for = waits_for
                if not waits_for:
                    return
                await asyncio.sleep(INDEX_POLL_SECONDS)
        finally:
            self.waits_for = []

    def read(self) -> ResidencyRows:
        return read_residency(self.ledger, self.size, self.base)

    async def residency(self) -> Residency:
        """Releases that stay loaded, without those whose CLIP adapter is gone or damaged; loads adapters to learn
        unknown spaces. Raises ReleaseError when the spaces of releases that answer requests are unknown."""
        return await resolve_residency(await asyncio.to_thread(self.read), self._ask)

    async def known_residency(self, rows: ResidencyRows) -> Residency:
        """Like :meth:`residency` without asking replicas: releases whose spaces are unknown are left out."""

        async def recall(clip: str | None) -> tuple[str, str] | None:
            return self.spaces.get(clip)

        return await resolve_residency(rows, recall)

    async def learn(self) -> None:
        """Take over the spaces of the releases that ingress replicas answer with now."""
        for snapshot in await self.broadcast.resident():
            self.spaces.setdefault(snapshot.clip, (snapshot.image_space, snapshot.text_space))

    def forget_others(self, clips: Collection[str | None]) -> None:
        """Forget the spaces of all other adapters: they are not loaded any more."""
        for clip in set(self.spaces).difference(clips):
            del self.spaces[clip]

    async def _ask(self, clip: str | None) -> tuple[str, str] | None:
        if clip in self.spaces:
            return self.spaces[clip]
        answers = await self.broadcast.prepare(clip)
        if answers and all(answer.unservable for answer in answers):
            return None
        return self._agreed(clip, [answer for answer in answers if not answer.unservable])

    def _agreed(self, clip: str | None, answers: list[Prepared]) -> tuple[str, str]:
        _check(answers, clip, "the base")
        spaces = {(answer.image_space, answer.text_space) for answer in answers}
        if len(spaces) != 1:
            raise ReleaseError(
                f"replicas disagree about the embedding spaces of {clip or 'the base'}: {sorted(spaces)}.",
                "Run the same version and the same base on every node.",
            )
        self.spaces[clip] = spaces.pop()
        return self.spaces[clip]


def _check(answers: list[Prepared], adapter: str | None, base: str) -> None:
    for answer in answers:
        if answer.error:
            raise ReleaseError(f"{adapter or base} cannot be served: {answer.error}")
