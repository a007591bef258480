"""The release protocol: propose, prepare, commit, announce, retire.

A release names a CLIP adapter and a VLM adapter. A proposal sets one of them or both; what it does not set stays what
is live at the moment of the commit, and is neither prepared nor touched. Beside a canary or a shadow that is what the
newest plain release has: whatever is released next ends the trial, and only a promotion takes over what was tried.

What is live changes at one point only, the ledger row of ``commit``. Before it, nothing that clients see has changed,
so a failure costs nothing; after it, every later step may be repeated by whoever comes next.

Proposals are prepared one at a time. A rollback to adapters that are resident needs no preparation, and waits for
nobody who prepares, retires or announces: it stops a preparation, commits, and announces with a short time limit.
Commits themselves are written one after the other, so that a preparation which was stopped does not commit any more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, Final, TypeVar

from core import metrics
from core.errors import LeaseLost, RatchetError, ReleaseError
from core.ledger.leases import CONTROLLER_LEASE
from core.ledger.ledger import Ledger
from core.ledger.proposals import ENDED
from core.ledger.rows import Family, HoldRow, ProposalKind, ProposalRow, ReleaseRow
from serving.releases.broadcast import RELEASE_SECONDS, ROLLBACK_SECONDS, Announcer
from serving.releases.commands import LiveCommand, PromoteCommand, ReleaseCommand, RollbackCommand
from serving.releases.lease import ControllerLease
from serving.releases.lineage import Lineage
from serving.releases.proposal_runner import Postponed, Preparation, ProposalRunner
from serving.releases.rollback import RollbackPlan, ledger_answers, plan_rollback
from serving.releases.types import Adapters, Broadcast, Goal, ReleaseResult, Residency, scope_of

Result = TypeVar("Result")
FOLLOW_SECONDS: Final = 0.25
"""Between two looks at a proposal that another controller carries out."""
STANDSTILL_SECONDS: Final = 60.0
"""An order is given up when the other controller neither takes it up nor renews its lease for this long. It may be busy
with another proposal for hours."""
ROLLBACK_THREADS: Final = 2
"""For the ledger calls of rollbacks, which share no thread with anything that may wait."""


class ReleaseProtocol:
    """Runs proposals, called from one event loop; the ledger guards against other processes."""

    def __init__(
        self,
        ledger: Ledger,
        broadcast: Broadcast,
        window: int,
        update_share: float = 1.0,
        hold_after_rollback: bool = False,
        lease: ControllerLease | None = None,
        lineage: Lineage | None = None,
    ) -> None:
        """Args:
        update_share: of the requests, for updates that passed the gate; see :attr:`ReleaseRow.share`.
        hold_after_rollback: see :attr:`core.settings.Rollout.hold_after_rollback`.
        lease: without it this process only proposes, and another one carries out; except rollbacks, whose commit checks
            that the live release is the expected one. None: there is no other process.
        lineage: the base that this server has. None: there is only one.
        """
        self.ledger = ledger
        self.broadcast = broadcast
        self.size = window
        self._lease = lease
        self._lineage = lineage
        self._preparation = Preparation(ledger, broadcast, window, None if lineage is None else lineage.digest)
        self._runner = ProposalRunner(ledger, self._preparation, update_share, hold_after_rollback, lease)
        self._announcer = Announcer(broadcast)
        self._turn = asyncio.Lock()
        self._planning: asyncio.Future[RollbackPlan] | None = None
        self._threads = ThreadPoolExecutor(ROLLBACK_THREADS, "rollback")

    @property
    def _epoch(self) -> int | None:
        return None if self._lease is None else self._lease.epoch

    async def start(self) -> ReleaseResult | None:
        """Continue from the ledger: make release 1 (the bases alone) if there is none, else announce what is live.

        Raises:
            LeaseLost: there is no release, and another process is about to make the first one.
            ReleaseError: no release has the base of this server, or what has it cannot be served.
        """
        self._preparation.learn(await self.broadcast.resident())
        if (live := await asyncio.to_thread(self.ledger.live)) is not None:
            if self._lineage is not None and not (await asyncio.to_thread(self._preparation.read)).window:
                self._lineage.check(live)
            await self.follow()
            return None
        if self._lease is not None and self._lease.epoch is None:
            raise LeaseLost("another controller makes the first release.", "Wait until it is live.")
        async with self._turn:
            waiting = await asyncio.to_thread(self.ledger.pending_proposals)
            initial = [proposal for proposal in waiting if proposal.kind == "initial"]
            return await self._run(initial[0] if initial else await asyncio.to_thread(self._propose_initial))

    async def follow(self) -> None:
        """Bring the replicas of this server to what is live by the ledger, whoever has committed it.

        Raises:
            ReleaseError: a CLIP adapter that answers requests cannot be served.
        """
        residency = await self.residency()
        await asyncio.gather(
            self._announcer.announce(residency, RELEASE_SECONDS),
            *(self.broadcast.cover(snapshot, wait=False) for snapshot in residency.indexed),
            return_exceptions=True,
        )

    async def step(self) -> ReleaseResult | None:
        """Run the oldest waiting proposal, if one may run: an update's waits while updates are on hold, while another
        one is on trial as a canary or a shadow and, where it is of the VLM, while no VLM replica answers.
        """
        async with self._turn:
            held, live, pending = await asyncio.to_thread(self._pending)
            if live is not None:
                metrics.release.live("controller", live.number)  # also one that was made offline
            waits = held is not None or (live is not None and not live.plain)
            waiting = await self._runner.without_abandoned(pending)
            metrics.release.waiting(len(waiting), held is not None)
            for proposal in waiting:
                if proposal.kind == "update" and (waits or await self._lacks_vlm(proposal)):
                    continue
                try:
                    return await self._run(proposal)
                except Postponed:
                    return None
            return None

    async def release(self, command: ReleaseCommand, forced: bool = False) -> ReleaseResult:
        """Release adapters for an operator. ``forced``: an adapter among them passed no gate and was never live.

        Raises:
            ReleaseConflict: something else is live by now.
            ReleaseError: an adapter cannot be served; what was live stays live.
        """
        if not command.adapters:
            raise ReleaseError("no adapter is named.", "Name a CLIP adapter, a VLM adapter, or both.")
        return await self._ordered("release", command.adapters, command, command.share, forced)

    async def promote(self, command: PromoteCommand) -> ReleaseResult:
        """A plain release of what is on trial. It is loaded everywhere, so this is a commit without a preparation.

        Raises:
            ReleaseError: nothing is on trial.
            ReleaseConflict: something else is live by now.
        """
        live = await asyncio.to_thread(self.ledger.live)
        if live is None or live.plain:
            raise ReleaseError(
                "no canary and no shadow is live, so nothing can be promoted.",
                "Start one: `ratchet releases create --share 0.1` or `--shadow`.",
            )
        both: Adapters = {"clip": live.clip, "vlm": live.vlm} if self.broadcast.has_vlm else {"clip": live.clip}
        return await self._ordered("promotion", both, command)

    async def rollback(self, command: RollbackCommand) -> ReleaseResult:
        """A new release with the adapters of an older one.

        A proposal that is being prepared is stopped. It fails, because it was judged against what is being taken back;
        an update of the other family waits instead. Adapters that are not resident any more are prepared first.

        Raises:
            ReleaseError: there is nothing to roll back to.
            ReleaseConflict: something else is live by now.
            LedgerUnavailable: the ledger is away; without an answer of it this takes
                :data:`serving.releases.rollback.ANSWER_SECONDS`.
        """
        began = time.perf_counter()
        async with AsyncExitStack() as committing:
            async with ledger_answers():
                await committing.enter_async_context(self._runner.committing)
                plan = await self._planned(command)
            if self._runner.work is not None:
                self._runner.work.stop(command, scope_of(plan.adapters))
            resident = plan.is_resident and await self._is_known(plan.goal["clip"])
            proposal = await self._in_thread(self._commit_rollback, plan, command) if resident else None
        if proposal is None:
            return await self._ordered("rollback", plan.adapters, command)
        committed = time.perf_counter()
        acknowledged = await self._announce(ROLLBACK_SECONDS)
        return ReleaseResult(
            plan.live + 1, plan.goal["clip"], plan.goal["vlm"], "rollback", proposal.family, proposal.id,
            committed - began, time.perf_counter() - committed, acknowledged,
        )  # fmt: skip

    async def residency(self) -> Residency:
        """See :meth:`Preparation.residency`."""
        return await self._preparation.residency()

    async def known_residency(self) -> Residency:
        """What stays loaded, as far as it is known without asking a replica."""
        return await self._preparation.known_residency(await asyncio.to_thread(self._preparation.read))

    async def retire(self, patience_seconds: float = 60.0) -> None:
        """Unload what left the window, once no request that was stamped with it is in flight. What is being prepared at
        that moment stays.
        """
        deadline = time.monotonic() + patience_seconds
        while set(await self.broadcast.in_flight()) - {s.release for s in (await self.residency()).window}:
            if time.monotonic() > deadline:
                return  # a later release retires it; memory is bounded by what is in flight
            await asyncio.sleep(0.1)
        keep, loading = await self._needed()
        preparing = [self._preparation.snapshot(number, goal["clip"]) for number, goal in loading]
        indexed = dict.fromkeys((*keep.indexed, *(snapshot for snapshot in preparing if snapshot is not None)))
        await self.broadcast.retire_spaces([*indexed], self._epoch)
        keep, loading = await self._needed()  # that took a while
        clips = tuple(dict.fromkeys((*keep.clips, *(goal["clip"] for _, goal in loading))))
        vlms = tuple(dict.fromkeys((*keep.vlms, *(goal["vlm"] for _, goal in loading))))
        self._preparation.forget_others(clips)  # before the wait: what is prepared meanwhile stays known
        await self.broadcast.retire(clips, vlms)

    async def _lacks_vlm(self, proposal: ProposalRow) -> bool:
        """Whether a proposal would only wait for a VLM that starts, and let those of CLIP wait behind it."""
        return proposal.family != "clip" and self.broadcast.has_vlm and not await self.broadcast.vlm_answers()

    async def _needed(self) -> tuple[Residency, list[tuple[int, Goal]]]:
        """What is resident; and the number and the adapters of what is being prepared, before and after the look at
        the ledger, which misses what is committed meanwhile."""
        before = self._runner.work
        residency = await self.residency()
        works = [work for work in (before, self._runner.work) if work is not None]
        return residency, [(work.number, work.goal) for work in works if work.goal is not None]

    def _propose_initial(self) -> ProposalRow:
        return self.ledger.propose(
            "initial", family="both", clip=None, vlm=None, actor="ratchet", reason="first start", expected_live=0,
            epoch=self._epoch,
        )  # fmt: skip

    def _pending(self) -> tuple[HoldRow | None, ReleaseRow | None, list[ProposalRow]]:
        """What is on hold, what is live, and what waits."""
        with self.ledger.reading():
            return self.ledger.held(), self.ledger.live(), self.ledger.pending_proposals()

    async def _planned(self, command: RollbackCommand) -> RollbackPlan:
        """A plan, one at a time: one that a caller gave up waiting for would make the next one wait in the threads."""
        if self._planning is not None:
            await asyncio.wait([self._planning])
        self._planning = asyncio.ensure_future(self._in_thread(self._plan_rollback, command))
        self._planning.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._planning)

    def _plan_rollback(self, command: RollbackCommand) -> RollbackPlan:
        served: tuple[Family, ...] = ("clip", "vlm") if self.broadcast.has_vlm else ("clip",)
        return plan_rollback(self.ledger, command, served, self.size, self._lineage)

    async def _is_known(self, clip: str | None) -> bool:
        """Whether replicas can serve an adapter that is resident; a process that has just begun asks the ingress."""
        if not self._preparation.knows(clip):
            self._preparation.learn(await self.broadcast.resident())
        return self._preparation.knows(clip)

    def _commit_rollback(self, plan: RollbackPlan, command: RollbackCommand) -> ProposalRow:
        proposal = self._propose("rollback", plan.adapters, command)
        try:
            self._runner.commit(proposal, plan.live + 1, plan.goal, 1.0, None)
        except RatchetError as error:
            self._runner.fail(proposal, str(error))
            raise
        return proposal

    def _propose(
        self, kind: ProposalKind, adapters: Adapters, command: LiveCommand, share: float = 1.0, forced: bool = False
    ) -> ProposalRow:
        return self.ledger.propose(
            kind, family=scope_of(adapters), clip=adapters.get("clip"), vlm=adapters.get("vlm"), actor=command.actor,
            reason=command.reason, expected_live=command.expected_live, share=share, forced=forced,
            epoch=None if kind == "rollback" else self._epoch,
        )  # fmt: skip

    async def _ordered(
        self, kind: ProposalKind, adapters: Adapters, command: LiveCommand, share: float = 1.0, forced: bool = False
    ) -> ReleaseResult:
        """Propose what an operator ordered, and run it, or wait until the process with the lease has.

        Raises ReleaseError where the live release has another base than this server.
        """
        if self._lineage is not None:
            self._lineage.check(await asyncio.to_thread(self.ledger.live))
        if self._lease is not None and self._lease.epoch is None:
            proposal = await asyncio.to_thread(self._propose, kind, adapters, command, share, forced)
            return await self._carried_out_elsewhere(proposal)
        async with self._turn:
            return await self._run(await asyncio.to_thread(self._propose, kind, adapters, command, share, forced))

    async def _carried_out_elsewhere(self, proposal: ProposalRow) -> ReleaseResult:
        began = moved = time.perf_counter()
        seen: object = None
        while proposal.state not in ENDED:
            await asyncio.sleep(FOLLOW_SECONDS)
            if (now := await asyncio.to_thread(self._movement)) != seen:
                seen, moved = now, time.perf_counter()
            elif time.perf_counter() - moved > STANDSTILL_SECONDS:
                await asyncio.to_thread(self._runner.fail, proposal, self._standstill(proposal))
            proposal = await asyncio.to_thread(self.ledger.proposal, proposal.id)
        if proposal.release is None:
            raise ReleaseError(f"{proposal.error}", "Look at what is live, and propose again.")
        row = await asyncio.to_thread(self.ledger.release, proposal.release)
        seconds = time.perf_counter() - began
        return ReleaseResult(
            row.number, row.clip, row.vlm, proposal.kind, proposal.family, proposal.id, seconds, 0.0, 0, row.share
        )

    def _movement(self) -> object:
        """What changes as long as the controller with the lease carries proposals out; preparing one may take hours."""
        with self.ledger.reading():
            states = [(proposal.id, proposal.state) for proposal in self.ledger.pending_proposals()]
            preparing = any(state == "preparing" for _, state in states)
            return states, self.ledger.lease(CONTROLLER_LEASE) if preparing else None

    def _standstill(self, proposal: ProposalRow) -> str:
        lease = self.ledger.lease(CONTROLLER_LEASE)
        leader = "none" if lease is None or not lease.holder else lease.holder
        return (
            f"proposal {proposal.id} is {proposal.state}, and the controller that leads ({leader}) has done nothing "
            f"for {STANDSTILL_SECONDS:g} s"
        )

    async def _run(self, proposal: ProposalRow) -> ReleaseResult:
        committed = await self._runner.run(proposal)
        return committed.outcome(await self._announce(RELEASE_SECONDS))

    async def _announce(self, seconds: float) -> int:
        """The release is committed: a replica that this does not reach follows the ledger by itself."""
        try:
            rows = await self._in_thread(self._preparation.read)
        except RatchetError:
            return 0
        residency = await self._preparation.known_residency(rows)
        return await self._announcer.announce(residency, seconds) if residency.window else 0

    async def _in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
