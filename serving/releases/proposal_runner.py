"""Runs one proposal at a time: has replicas load it, commits it, and writes down how it ended. No Ray here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Coroutine
from dataclasses import dataclass
from typing import Any, Final

from core.errors import Held, LeaseLost, LedgerError, LedgerUnavailable, RatchetError, ReleaseConflict, ReleaseError
from core.ledger.ledger import Ledger
from core.ledger.rows import ProposalKind, ProposalRow, ReleaseRow, Scope
from serving.releases.commands import RollbackCommand
from serving.releases.lease import ControllerLease
from serving.releases.release_snapshot import ReleaseSnapshot
from serving.releases.residency import ResidencyRows, read_residency, resolve_residency
from serving.releases.rollback import check_live, goal_of
from serving.releases.types import NO_VLM, Broadcast, Goal, Prepared, ReleaseResult, Residency, proposed_adapters

TAKEN_UP: Final[tuple[ProposalKind, ...]] = ("initial", "update")
"""Kinds that nobody waits for: what failed with the ledger or the lease is carried out later."""


class Postponed(Exception):
    """A proposal gave way to a rollback of the other family or to a hold; it waits for its turn again."""


@dataclass(slots=True)
class Work:
    """A proposal from the moment it has its turn until it is committed."""

    proposal: ProposalRow
    task: asyncio.Task[Any] | None = None
    """Prepares it; may be cancelled."""
    goal: Goal | None = None
    """What replicas are loading for it."""
    number: int = 0
    """Of the release that it will be."""
    stopped_by: str = ""
    stopped_for: Scope = "both"

    def stop(self, command: RollbackCommand, scope: Scope) -> None:
        """Prepare no further, and do not commit."""
        self.stopped_by = f"{command.actor} rolled back while it was being prepared"
        self.stopped_for = scope
        if self.task is not None:
            self.task.cancel()

    def check(self) -> None:
        """Raise when it was stopped.

        Raises:
            Postponed: for an update of the other family, which waits again.
            ReleaseConflict: for all others.
        """
        if not self.stopped_by:
            return
        if self.proposal.kind == "update" and {self.proposal.family, self.stopped_for} == {"clip", "vlm"}:
            raise Postponed
        raise ReleaseConflict(f"{self.stopped_by}.", "Look at what is live, and propose again.")


class Preparation:
    """Makes replicas ready for adapters, and knows the spaces of those that they hold. Use from one event loop."""

    def __init__(self, ledger: Ledger, broadcast: Broadcast, size: int, base: str | None = None) -> None:
        """``base``: digest of the base that the encoders have; None: there is only one."""
        self.ledger = ledger
        self.broadcast = broadcast
        self.size = size
        self.base = base
        self._spaces: dict[str | None, tuple[str, str]] = {}

    async def make_ready(self, goal: Goal, live: ReleaseRow | None) -> None:
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


@dataclass(frozen=True, slots=True)
class Committed:
    """A proposal whose release is in the ledger, and is not announced yet."""

    proposal: ProposalRow
    number: int
    goal: Goal
    share: float
    prepare_seconds: float
    prepared_at: float
    """By the performance counter."""

    def outcome(self, acknowledged: int) -> ReleaseResult:
        """Once it is announced."""
        proposal = self.proposal
        return ReleaseResult(
            self.number, self.goal["clip"], self.goal["vlm"], proposal.kind, proposal.family, proposal.id,
            self.prepare_seconds, time.perf_counter() - self.prepared_at, acknowledged, self.share,
        )  # fmt: skip


class ProposalRunner:
    """Prepares and commits. Use from one event loop, and :meth:`run` one at a time."""

    def __init__(
        self, ledger: Ledger, preparation: Preparation, update_share: float, hold_after_rollback: bool,
        lease: ControllerLease | None,
    ) -> None:  # fmt: skip
        """Args: see :class:`serving.releases.protocol.ReleaseProtocol`."""
        self.ledger = ledger
        self.update_share = update_share
        self.hold_after_rollback = hold_after_rollback
        self.lease = lease
        self.work: Work | None = None
        """What is being prepared."""
        self.committing = asyncio.Lock()
        """Held from the last check before a commit until its end."""
        self._preparation = preparation
        self._abandoned: dict[int, str] = {}

    def epoch(self) -> int | None:
        """For writes that need the lease. Raises LeaseLost while another process has it."""
        if self.lease is not None and self.lease.epoch is None:
            raise LeaseLost("another controller has taken over.", "It goes on with what is proposed.")
        return None if self.lease is None else self.lease.epoch

    async def without_abandoned(self, waiting: list[ProposalRow]) -> list[ProposalRow]:
        """Write down the end of proposals that failed while the ledger was away: who ordered them was told so."""
        abandoned, self._abandoned = self._abandoned, {}
        for proposal in waiting:
            if proposal.id in abandoned:
                await asyncio.to_thread(self.fail, proposal, abandoned[proposal.id])
        return [proposal for proposal in waiting if proposal.id not in abandoned]

    async def run(self, proposal: ProposalRow) -> Committed:
        """Carry a proposal out, and write down how it ended.

        Raises:
            Postponed: it waits for its turn again.
            ReleaseConflict: something else is live by now, or it was stopped.
            ReleaseError: it cannot be served; what was live stays live.
            LedgerUnavailable, LeaseLost: this process cannot go on with it.
        """
        began = time.perf_counter()
        work = self.work = Work(proposal)
        try:
            share = await self._prepared(work)
            prepared = time.perf_counter()
            await self._commit_prepared(work, share)
        except Postponed:
            await self._postpone(proposal)
            raise
        except (LeaseLost, LedgerUnavailable) as error:
            if proposal.kind not in TAKEN_UP:
                self._abandoned[proposal.id] = str(error)
            raise
        except RatchetError as error:
            await asyncio.to_thread(self.fail, proposal, str(error))
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            await asyncio.to_thread(self.fail, proposal, reason)
            raise ReleaseError(
                f"proposal {proposal.id} failed: {reason}.", "What was live stays live; look at the server's log."
            ) from error
        finally:
            self.work = None
        assert work.goal is not None
        return Committed(proposal, work.number, work.goal, share, prepared - began, prepared)

    async def _prepared(self, work: Work) -> float:
        """Prepare in a task that a rollback may cancel. Returns the share of the requests that it will answer."""
        task = work.task = asyncio.get_running_loop().create_task(self._prepare(work))
        try:
            return float(await task)
        except asyncio.CancelledError:
            work.check()
            task.cancel()
            raise  # this process ends: the proposal stays, and is taken up at the next start

    async def _prepare(self, work: Work) -> float:
        proposal = work.proposal
        live = await asyncio.to_thread(self.ledger.live)
        if proposal.expected_live is not None:
            check_live(live, proposal.expected_live)
        if proposal.family == "vlm" and not self._preparation.broadcast.has_vlm:
            raise ReleaseError("no vision-language model is served here.", NO_VLM)
        if proposal.kind == "update":
            await self._refuse_withdrawn(proposal)
        await asyncio.to_thread(lambda: self.ledger.advance_proposal(proposal.id, "preparing", epoch=self.epoch()))
        work.number = live.number + 1 if live else 1
        work.goal = goal_of(proposed_adapters(proposal), await asyncio.to_thread(self.ledger.stable))
        await self._preparation.make_ready(work.goal, live)
        return self.update_share if proposal.kind == "update" else proposal.share

    async def _commit_prepared(self, work: Work, share: float) -> None:
        assert work.goal is not None
        async with self.committing:
            work.check()
            try:
                await asyncio.to_thread(self.commit, work.proposal, work.number, work.goal, share, self.epoch())
            except Held:
                if work.proposal.kind == "update":
                    raise Postponed from None
                raise
            self.work = None

    def commit(self, proposal: ProposalRow, number: int, goal: Goal, share: float, epoch: int | None) -> None:
        """Write the release, under :attr:`committing`. ``epoch``: None for a rollback, which needs no lease."""
        self.ledger.commit_release(
            number, clip=goal["clip"], vlm=goal["vlm"], actor=proposal.actor, reason=proposal.reason,
            proposal_id=proposal.id, share=share, epoch=epoch, hold_after_rollback=self.hold_after_rollback,
        )  # fmt: skip

    async def _postpone(self, proposal: ProposalRow) -> None:
        await asyncio.to_thread(lambda: self.ledger.advance_proposal(proposal.id, "pending", epoch=self.epoch()))

    def fail(self, proposal: ProposalRow, reason: str) -> None:
        """Write down the end of a proposal. Where that cannot be done it is done later, and not carried out."""
        try:
            self.ledger.advance_proposal(proposal.id, "failed", reason)
        except ReleaseConflict:  # it ended elsewhere
            return
        except LedgerError:
            self._abandoned[proposal.id] = reason

    async def _refuse_withdrawn(self, proposal: ProposalRow) -> None:
        """An update may make again what the guard took back: same data, same recipe, same adapter."""
        withdrawn = await asyncio.to_thread(self.ledger.withdrawn, [*proposed_adapters(proposal).values()])
        for name, why in withdrawn.items():
            raise ReleaseError(f"{name} was withdrawn: {why}", "An operator can release it with --force.")
