"""The release protocol: propose, prepare, commit, announce, retire.

A proposal sets a CLIP adapter, a VLM adapter, or both. What it does not set stays as it is live at the commit; during a
canary or a shadow, as in the newest full release: any later release ends the trial, and only a promotion keeps it. What
is live changes only with the ledger row of ``commit``: a failure before it changes nothing for clients, and after it
any process may repeat the later steps. Proposals are prepared one at a time. A rollback to resident adapters needs no
preparation, and stops one that runs. Commits are serialized, so a stopped preparation cannot commit."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any, Final, TypeVar

from core import metrics
from core.errors import Held, LeaseLost, LedgerError, LedgerUnavailable, RatchetError, ReleaseConflict, ReleaseError
from core.ledger import Ledger
from core.ledger.rows import HoldRow, ProposalKind, ProposalRow, ProposalState, ReleaseRow
from serving.releases.broadcast import Broadcast, Unacknowledged
from serving.releases.leadership import ControllerLease, Lineage, wait_for_leader
from serving.releases.preparation import IndexPolicy, Postponed, Preparation, PreparingProposal
from serving.releases.rollback import commit_rollback, ledger_answers, plan_rollback
from serving.releases.types import (
    FAMILIES,
    NO_VLM,
    Adapters,
    LiveCommand,
    PromoteCommand,
    ReleaseCommand,
    ReleaseResult,
    ReleaseSnapshot,
    Residency,
    RollbackCommand,
    TargetAdapters,
    proposed_adapters,
    scope_of,
    target_adapters,
)

log = logging.getLogger("ratchet.protocol")
Result = TypeVar("Result")
RELEASE_SECONDS: Final = 10.0
"""For replicas to acknowledge a release; the operator's call returns when every replica serves it."""
ROLLBACK_SECONDS: Final = 0.3
"""The same for a rollback. Replicas that work take some 10 ms; others may be starting, stuck or dead. They still get
the message, read the ledger every second or two, and are told again."""
HEAL_ATTEMPTS: Final = 6
HEAL_PAUSE_SECONDS: Final = 2.0
TAKEN_UP: Final[tuple[ProposalKind, ...]] = ("initial", "update")
"""Kinds for which no operator waits: after a failure of the ledger or the lease they are carried out later."""


class ReleaseProtocol:
    """Runs proposals. Call from one event loop; the ledger guards against other processes."""

    def __init__(
        self,
        ledger: Ledger,
        broadcast: Broadcast,
        window: int,
        update_share: float = 1.0,
        hold_after_rollback: bool = False,
        lease: ControllerLease | None = None,
        lineage: Lineage | None = None,
        indexes: IndexPolicy = "wait",
    ) -> None:
        """``update_share``: of requests, for updates that passed the gate; see :attr:`ReleaseRow.share`. ``lease``:
        while another process holds it, this one only proposes or rolls back; None: there is no other. ``lineage``: this
        server's base; None: there is only one. ``indexes``: ``rollout.indexes``."""
        self.ledger = ledger
        self.broadcast = broadcast
        base = None if lineage is None else lineage.digest
        self.preparation = Preparation(ledger, broadcast, window, base, indexes)
        self._update_share = update_share
        self._hold_after_rollback = hold_after_rollback
        self._lease = lease
        self._lineage = lineage
        self._turn = asyncio.Lock()
        self._preparing: PreparingProposal | None = None
        self._committing = asyncio.Lock()
        """Held from the last check before a commit until its end."""
        self._abandoned: dict[int, str] = {}
        """Failed proposals whose end could not be written, with the reason."""
        self._planning: asyncio.Future[tuple[Adapters, TargetAdapters, bool]] | None = None
        self._healing: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(2, "rollback")  # apart from threads that may hang

    async def start(self) -> ReleaseResult | None:
        """Continue from the ledger: announce what is live, or make release 1 (the bases alone). Raises LeaseLost when
        another process is to make the first release; ReleaseError when no release has this server's base, or it cannot
        be served."""
        await self.preparation.learn()
        if (live := await asyncio.to_thread(self.ledger.live)) is not None:
            if self._lineage is not None and not (await asyncio.to_thread(self.preparation.read)).window:
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
        """Bring this server's replicas to what is live in the ledger, whichever process committed it. Raises
        ReleaseError when a CLIP adapter that answers requests cannot be served."""
        residency = await self.preparation.residency()
        await asyncio.gather(
            self._announce(residency, RELEASE_SECONDS),
            *(self.broadcast.cover(snapshot, wait=False) for snapshot in residency.indexed),
            return_exceptions=True,
        )

    async def step(self) -> ReleaseResult | None:
        """Run the oldest proposal that may run. Updates wait during a hold, a canary or a shadow; those of the VLM also
        while no VLM replica answers."""
        async with self._turn:
            held, live, pending = await asyncio.to_thread(self._pending)
            if live is not None:
                metrics.release.live("controller", live.number)  # also one that was made offline
            waits = held is not None or (live is not None and not live.plain)
            waiting = await self._without_abandoned(pending)
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
        """Release adapters for an operator. ``forced``: one of them passed no gate and was never live. Raises
        ReleaseConflict when something else is live by now; ReleaseError when an adapter cannot be served: what was live
        stays live."""
        if not command.adapters:
            raise ReleaseError("no adapter is named.", "Name a CLIP adapter, a VLM adapter, or both.")
        return await self._ordered("release", command.adapters, command, command.share, forced)

    async def promote(self, command: PromoteCommand) -> ReleaseResult:
        """Make a full release of what is on trial; it is loaded everywhere, so this only commits. Raises ReleaseError
        when nothing is on trial, ReleaseConflict when something else is live by now."""
        live = await asyncio.to_thread(self.ledger.live)
        if live is None or live.plain:
            raise ReleaseError(
                "no canary and no shadow is live, so nothing can be promoted.",
                "Start one: `ratchet releases create --share 0.1` or `--shadow`.",
            )
        both: Adapters = {"clip": live.clip, "vlm": live.vlm} if self.broadcast.has_vlm else {"clip": live.clip}
        return await self._ordered("promotion", both, command)

    async def _ordered(
        self, kind: ProposalKind, adapters: Adapters, command: LiveCommand, share: float = 1.0, forced: bool = False
    ) -> ReleaseResult:
        """Propose an operator's order, and run it, or wait until the process with the lease has. Raises ReleaseError
        where the live release has another base."""

        def propose() -> ProposalRow:
            return self.ledger.propose(
                kind, family=scope_of(adapters), clip=adapters.get("clip"), vlm=adapters.get("vlm"),
                actor=command.actor, reason=command.reason, expected_live=command.expected_live, share=share,
                forced=forced, epoch=None if kind == "rollback" else self._epoch,
            )  # fmt: skip

        if self._lineage is not None:
            self._lineage.check(await asyncio.to_thread(self.ledger.live))
        if self._lease is not None and self._lease.epoch is None:
            began = time.perf_counter()
            ended = await wait_for_leader(self.ledger, await asyncio.to_thread(propose), self._fail)
            if ended.release is None:
                raise ReleaseError(f"{ended.error}", "Look at what is live, and propose again.")
            row, seconds = await asyncio.to_thread(self.ledger.release, ended.release), time.perf_counter() - began
            return ReleaseResult(
                row.number, row.clip, row.vlm, ended.kind, ended.family, ended.id, seconds, 0.0, 0, row.share
            )
        async with self._turn:
            return await self._run(await asyncio.to_thread(propose))

    async def _run(self, proposal: ProposalRow) -> ReleaseResult:
        """Carry a proposal out, and record how it ended. Raises Postponed when it waits for its turn again,
        ReleaseConflict when something else is live by now or it was stopped, ReleaseError when it cannot be served
        (what was live stays live), LedgerUnavailable or LeaseLost when this process cannot continue it."""
        began = time.perf_counter()
        work = self._preparing = PreparingProposal(proposal)
        try:
            target = await self._prepared(work)
            prepared = time.perf_counter()
            await self._commit(work, target)
        except Postponed:
            await self._advance(proposal, "pending")
            raise
        except (LeaseLost, LedgerUnavailable) as error:
            if proposal.kind not in TAKEN_UP:
                self._abandoned[proposal.id] = str(error)
            raise
        except RatchetError as error:
            await asyncio.to_thread(self._fail, proposal, str(error))
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            await asyncio.to_thread(self._fail, proposal, reason)
            raise ReleaseError(
                f"proposal {proposal.id} failed: {reason}.", "What was live stays live; look at the server's log."
            ) from error
        finally:
            self._preparing = None
        acknowledged = await self._announce_live(RELEASE_SECONDS)
        return ReleaseResult(
            work.number, target["clip"], target["vlm"], proposal.kind, proposal.family, proposal.id, prepared - began,
            time.perf_counter() - prepared, acknowledged, work.share,
        )  # fmt: skip

    async def _prepared(self, work: PreparingProposal) -> TargetAdapters:
        """Prepare in a task that a rollback may cancel."""
        task = work.task = asyncio.create_task(self._prepare(work))
        try:
            return await task
        except asyncio.CancelledError:
            work.check()
            task.cancel()
            raise  # this process ends: the proposal stays, and is taken up at the next start

    async def _prepare(self, work: PreparingProposal) -> TargetAdapters:
        proposal = work.proposal
        live = await asyncio.to_thread(self.ledger.live)
        number = live.number if live else 0
        if proposal.expected_live not in (None, number):
            raise ReleaseConflict(
                f"release {number} is live, not {proposal.expected_live}: somebody released first.",
                "Look at `ratchet releases list` and decide again.",
            )
        if proposal.family == "vlm" and not self.broadcast.has_vlm:
            raise ReleaseError("no vision-language model is served here.", NO_VLM)
        adapters = proposed_adapters(proposal)
        if proposal.kind == "update":  # the same data and recipe may yield an adapter that the guard took back
            withdrawn = await asyncio.to_thread(self.ledger.withdrawn, [*adapters.values()])
            for name, why in withdrawn.items():
                raise ReleaseError(f"{name} was withdrawn: {why}", "An operator can release it with --force.")
        await self._advance(proposal, "preparing")
        work.number = number + 1
        work.share = self._update_share if proposal.kind == "update" else proposal.share
        work.target = target_adapters(adapters, await asyncio.to_thread(self.ledger.stable))
        await self.preparation.make_ready(work.target, live)
        if proposal.kind != "rollback":
            await self.preparation.wait_for_indexes(work.target["clip"], live)
        return work.target

    async def _commit(self, work: PreparingProposal, target: TargetAdapters) -> None:
        async with self._committing:
            work.check()
            epoch, proposal = self._needed_epoch(), work.proposal
            try:
                await asyncio.to_thread(
                    lambda: self.ledger.commit_release(
                        work.number, clip=target["clip"], vlm=target["vlm"], actor=proposal.actor,
                        reason=proposal.reason, proposal_id=proposal.id, share=work.share, epoch=epoch,
                        hold_after_rollback=self._hold_after_rollback,
                    )
                )  # fmt: skip
            except Held:
                if proposal.kind == "update":
                    raise Postponed from None
                raise
            self._preparing = None

    async def _announce_live(self, seconds: float) -> int:
        """Announce what was just committed. Replicas that are not reached follow the ledger by themselves."""
        try:
            rows = await self._in_thread(self.preparation.read)
        except RatchetError:
            return 0
        residency = await self.preparation.known_residency(rows)
        return await self._announce(residency, seconds) if residency.window else 0

    async def _announce(self, residency: Residency, seconds: float) -> int:
        """Tell every replica; never fails. Those that do not answer within ``seconds`` are told again in the
        background, until the next announcement. Returns how many acknowledged."""
        if self._healing is not None:
            self._healing.cancel()
            self._healing = None
        try:
            async with asyncio.timeout(2 * seconds):  # the broadcast has a time limit of its own
                return await self.broadcast.announce(residency, seconds)
        except Exception as error:
            log.info("not every replica was reached: %s: %s", type(error).__name__, error)
            self._healing = asyncio.get_running_loop().create_task(self._heal(residency))
            return error.acknowledged if isinstance(error, Unacknowledged) else 0

    async def _heal(self, residency: Residency) -> None:
        for _ in range(HEAL_ATTEMPTS):
            try:
                async with asyncio.timeout(2 * RELEASE_SECONDS):
                    await self.broadcast.announce(residency, RELEASE_SECONDS)
                return
            except Exception as error:
                log.info("a replica is told again: %s: %s", type(error).__name__, error)
            await asyncio.sleep(HEAL_PAUSE_SECONDS)

    async def retire(self, patience_seconds: float = 60.0) -> None:
        """Unload what left the window once no request uses it. Adapters that are being prepared stay."""
        deadline = time.monotonic() + patience_seconds
        while set(await self.broadcast.in_flight()) - {s.release for s in (await self.preparation.residency()).window}:
            if time.monotonic() > deadline:
                return  # a later release retires it; requests in flight bound the memory
            await asyncio.sleep(0.1)
        keep, loading = await self._needed()
        spaces = self.preparation.spaces
        preparing = [ReleaseSnapshot(n, t["clip"], *spaces[t["clip"]]) for n, t in loading if t["clip"] in spaces]
        await self.broadcast.retire_spaces([*dict.fromkeys((*keep.indexed, *preparing))], self._epoch)
        keep, loading = await self._needed()  # that took a while
        clips = tuple(dict.fromkeys((*keep.clips, *(target["clip"] for _, target in loading))))
        vlms = tuple(dict.fromkeys((*keep.vlms, *(target["vlm"] for _, target in loading))))
        self.preparation.forget_others(clips)  # before the wait: what is prepared meanwhile stays known
        await self.broadcast.retire(clips, vlms)

    async def _needed(self) -> tuple[Residency, list[tuple[int, TargetAdapters]]]:
        """The residency, and number and adapters of what is being prepared, read before and after the ledger: a commit
        meanwhile is in one of them."""
        before = self._preparing
        residency = await self.preparation.residency()
        works = [work for work in (before, self._preparing) if work is not None]
        return residency, [(work.number, work.target) for work in works if work.target is not None]

    async def rollback(self, command: RollbackCommand) -> ReleaseResult:
        """Release the adapters of an older release; adapters that are not resident any more are prepared first. Stops a
        proposal in preparation, which fails because it was judged against what is taken back; an update of the other
        family waits. Raises ReleaseError when there is nothing to roll back to, ReleaseConflict when something else is
        live by now, LedgerUnavailable when the ledger did not answer within
        :data:`serving.releases.rollback.ANSWER_SECONDS`."""
        began = time.perf_counter()
        async with AsyncExitStack() as committing:
            async with ledger_answers():
                await committing.enter_async_context(self._committing)
                adapters, target, resident = await self._planned(command)
            if self._preparing is not None:
                self._preparing.stop(command, scope_of(adapters))
            if resident and target["clip"] not in self.preparation.spaces:
                await self.preparation.learn()  # this process has just started: ask the ingress
            proposal = None
            if resident and target["clip"] in self.preparation.spaces:
                proposal = await self._in_thread(
                    commit_rollback, self.ledger, command, adapters, target, self._hold_after_rollback, self._fail
                )
        if proposal is None:
            return await self._ordered("rollback", adapters, command)
        committed = time.perf_counter()
        acknowledged = await self._announce_live(ROLLBACK_SECONDS)
        return ReleaseResult(
            command.expected_live + 1, target["clip"], target["vlm"], "rollback", proposal.family, proposal.id,
            committed - began, time.perf_counter() - committed, acknowledged,
        )  # fmt: skip

    async def _planned(self, command: RollbackCommand) -> tuple[Adapters, TargetAdapters, bool]:
        """Plan one rollback at a time, so that plans that callers gave up on do not fill the threads."""
        if self._planning is not None:
            await asyncio.wait([self._planning])
        self._planning = asyncio.ensure_future(self._in_thread(self._plan_rollback, command))
        self._planning.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(self._planning)

    def _plan_rollback(self, command: RollbackCommand) -> tuple[Adapters, TargetAdapters, bool]:
        """The adapters that a rollback sets, those of the new release, and whether replicas keep them."""
        with self.ledger.reading():
            served = FAMILIES if self.broadcast.has_vlm else FAMILIES[:1]
            adapters, target = plan_rollback(self.ledger, command, served, self._lineage)
            rows = self.preparation.read()
        return adapters, target, target["clip"] in rows.clips and target["vlm"] in rows.vlms

    async def known_residency(self) -> Residency:
        return await self.preparation.known_residency(await asyncio.to_thread(self.preparation.read))

    @property
    def _epoch(self) -> int | None:
        return None if self._lease is None else self._lease.epoch

    def _needed_epoch(self) -> int | None:
        """The epoch for writes that need the lease. Raises LeaseLost while another process has it."""
        if self._lease is not None and self._lease.epoch is None:
            raise LeaseLost("another controller has taken over.", "It goes on with what is proposed.")
        return self._epoch

    async def _advance(self, proposal: ProposalRow, state: ProposalState) -> None:
        epoch = self._needed_epoch()
        await asyncio.to_thread(lambda: self.ledger.advance_proposal(proposal.id, state, epoch=epoch))

    def _fail(self, proposal: ProposalRow, reason: str) -> None:
        """Record that a proposal failed, now or when the ledger is back; it is not run until then."""
        try:
            self.ledger.advance_proposal(proposal.id, "failed", reason)
        except ReleaseConflict:  # it ended elsewhere
            return
        except LedgerError:
            self._abandoned[proposal.id] = reason

    async def _without_abandoned(self, waiting: list[ProposalRow]) -> list[ProposalRow]:
        """Record the end of proposals that failed while the ledger was away, and leave them out."""
        abandoned, self._abandoned = self._abandoned, {}
        for proposal in waiting:
            if proposal.id in abandoned:
                await asyncio.to_thread(self._fail, proposal, abandoned[proposal.id])
        return [proposal for proposal in waiting if proposal.id not in abandoned]

    async def _lacks_vlm(self, proposal: ProposalRow) -> bool:
        """True if a proposal would only wait for a VLM that starts, and delay those of CLIP behind it."""
        return proposal.family != "clip" and self.broadcast.has_vlm and not await self.broadcast.vlm_status()

    def _propose_initial(self) -> ProposalRow:
        return self.ledger.propose(
            "initial", family="both", clip=None, vlm=None, actor="ratchet", reason="first start", expected_live=0,
            epoch=self._epoch,
        )  # fmt: skip

    def _pending(self) -> tuple[HoldRow | None, ReleaseRow | None, list[ProposalRow]]:
        with self.ledger.reading():
            return self.ledger.held(), self.ledger.live(), self.ledger.pending_proposals()

    async def _in_thread(self, function: Callable[..., Result], *args: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)
