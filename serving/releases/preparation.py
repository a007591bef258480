"""What replicas can serve: they are asked to load adapters, and the embedding spaces that they answer with are kept."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Mapping
from typing import Any

from core.errors import ReleaseError
from core.ledger.ledger import Ledger
from core.ledger.rows import Family, ReleaseRow
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.residency import ResidencyRows, read_residency, resolve_residency
from serving.releases.types import Broadcast, Prepared, Residency


class Preparation:
    """Makes replicas ready for adapters, and knows the spaces of those that they hold. Use from one event loop."""

    def __init__(self, ledger: Ledger, broadcast: Broadcast, size: int, base: str | None = None) -> None:
        """``base``: digest of the base that the encoders have; None: there is only one."""
        self.ledger = ledger
        self.broadcast = broadcast
        self.size = size
        self.base = base
        self._spaces: dict[str | None, tuple[str, str]] = {}

    async def make_ready(self, goal: Mapping[Family, str | None], live: ReleaseRow | None) -> None:
        """Both families at once, only what changes. The first release, of the bases alone, waits for encoders only: VLM
        replicas start with their base, and say by themselves when they cannot; the catalog embeds what there is as soon
        as it is told.

        Raises:
            ReleaseError: a replica cannot serve an adapter.
        """
        jobs: list[Coroutine[Any, Any, None]] = []
        if live is None or goal["clip"] != live.clip:
            jobs.append(self._ready_clip(goal["clip"], live))
        if self.broadcast.has_vlm and goal["vlm"] != (live.vlm if live else None):
            jobs.append(self._ready_vlm(goal["vlm"]))
        await _together(jobs)

    def read(self) -> ResidencyRows:
        """What the ledger says is resident."""
        return read_residency(self.ledger, self.size, self.base)

    async def residency(self) -> Residency:
        """What stays loaded. Spaces that are not known are asked for: adapters are loaded for it. Releases whose CLIP
        adapter is gone or damaged are left out.

        Raises:
            ReleaseError: the encoders cannot tell the spaces of what answers requests.
        """
        rows = await asyncio.to_thread(self.read)
        return await resolve_residency(rows, self._ask)

    async def known_residency(self, rows: ResidencyRows) -> Residency:
        """The same without asking anybody: without releases whose spaces are not known here."""
        return await resolve_residency(rows, self._recall)

    def knows(self, clip: str | None) -> bool:
        """Whether replicas have said that they can serve an adapter."""
        return clip in self._spaces

    def learn(self, snapshots: Collection[ReleaseSnapshot]) -> None:
        """Take over what ingress replicas answer with at this moment."""
        for snapshot in snapshots:
            self._spaces.setdefault(snapshot.clip, (snapshot.image_space, snapshot.text_space))

    def forget_others(self, clips: Collection[str | None]) -> None:
        """Let go of what is known about all other adapters: they are not loaded any more."""
        for clip in set(self._spaces).difference(clips):
            del self._spaces[clip]

    def snapshot(self, number: int, clip: str | None) -> ReleaseSnapshot | None:
        """A release of an adapter, where its spaces are known."""
        spaces = self._spaces.get(clip)
        return None if spaces is None else ReleaseSnapshot(number, clip, *spaces)

    async def _ready_clip(self, clip: str | None, live: ReleaseRow | None) -> None:
        image, text = await self._prepare(clip)
        if live is None:
            return
        residency = await asyncio.to_thread(self.read)
        # A resident space is kept complete all the time: a rollback need not wait for rows that arrive right now.
        snapshot = ReleaseSnapshot(live.number + 1, clip, image, text)
        await self.broadcast.cover(snapshot, wait=clip not in residency.clips)

    async def _ready_vlm(self, vlm: str | None) -> None:
        _check(await self.broadcast.prepare_vlm(vlm), vlm, "the VLM base")

    async def _prepare(self, clip: str | None) -> tuple[str, str]:
        return self._agreed(clip, await self.broadcast.prepare(clip))

    async def _ask(self, clip: str | None) -> tuple[str, str] | None:
        if clip in self._spaces:
            return self._spaces[clip]
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
        self._spaces[clip] = spaces.pop()
        return self._spaces[clip]

    async def _recall(self, clip: str | None) -> tuple[str, str] | None:
        return self._spaces.get(clip)


def _check(answers: list[Prepared], adapter: str | None, base: str) -> None:
    for answer in answers:
        if answer.error:
            raise ReleaseError(f"{adapter or base} cannot be served: {answer.error}")


async def _together(jobs: list[Coroutine[Any, Any, None]]) -> None:
    """All jobs at once; the first failure stops the others."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
