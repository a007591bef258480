"""Runs one proposal at a time: prepares it, commits it, and writes down how it ended. No Ray here."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final, Protocol

from core.errors import Held, LeaseLost, LedgerError, LedgerUnavailable, RatchetError, ReleaseConflict, ReleaseError
from core.ledger.ledger import Ledger
from core.ledger.rows import ProposalKind, ProposalRow
from serving.releases.preparation import Preparation
from serving.releases.rollback import check_live, goal_of
from serving.releases.types import NO_VLM, ReleaseResult, proposed_adapters
from serving.releases.work import Goal, Postponed, Work

TAKEN_UP: Final[tuple[ProposalKind, ...]] = ("initial", "update")
"""Kinds that nobody waits for: what failed with the ledger or the lease is carried out later."""


class Lease(Protocol):
    """The right to prepare and commit proposals; see :class:`serving.releases.lease.ControllerLease`."""

    @property
    def epoch(self) -> int | None:
        """None while another process has it."""


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
        lease: Lease | None,
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
